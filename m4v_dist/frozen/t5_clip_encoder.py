"""PyramidFlow's text encoders: T5-XXL's last hidden states as tokens, CLIP ViT-L/14's pooled text as the pooled vector.

`text_encoder.weights` names a local folder as PyramidFlow's miniFLUX is released (FLUX.1's layout), of which four parts
are read:

| part | what |
|---|---|
| `text_encoder` | CLIP text model: `config.json`, `model.safetensors`, whole or in shards with their index |
| `tokenizer` | its tokenizer: `tokenizer.json`, or `vocab.json` with `merges.txt` |
| `text_encoder_2` | T5 v1.1 encoder, as above |
| `tokenizer_2` | its tokenizer: `tokenizer.json` |

The release pads T5's ids to 128 with a mask. Here a caption is encoded alone and without padding: what a mask hides
has no part in the others' states, so the tokens are the same and the padding is never stored. CLIP looks back only and
is read at the first end marker, so its padding has no part either. Weights may be stored in bfloat16 or float16;
`text_encoder.dtype` is what they run in.

Source: PyramidFlow pyramid_dit/flux_modules/modeling_text_encoder.py at 3040d71 (FluxTextEncoderWithMask).

Legend: `n` text tokens, `d` width of a token, `p` width of the pooled vector.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.pretrained_text import check_captions, load_clip, load_t5, load_t5_tokenizer, num_tokens, tokenize
from m4v_dist.weights_file import DTYPES, read_layout, sha256

MAX_CLIP_TOKENS = 77
"""CLIP has learnt that many positions."""
_CLIP, _CLIP_TOKENIZER, _T5, _T5_TOKENIZER = "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class T5ClipEncoder:
    """T5 for the tokens, CLIP for the pooled vector; see the module's docstring.

    Args:
        folder: local folder of the four parts.
        max_tokens: longest caption of T5, in tokens, its end marker counted.
        dtype: what both run in.
        device: where both run; the features come back on the CPU.

    Attributes:
        num_cut_captions: captions so far that were longer than `max_tokens`, or than the 77 of CLIP, whose pooled
            vector then stands for their beginning.

    Raises:
        ConfigError: a part is missing; the message names it.
        DataError: a part is damaged, or of another network.
    """

    name = "t5_clip"

    def __init__(
        self,
        folder: str,
        max_tokens: int,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
    ) -> None:
        self._fingerprint = t5_clip_fingerprint(folder, max_tokens, dtype)
        for file in _files(Path(folder)):
            if file.suffix == ".safetensors":
                _check_weights(file)
        self._max_tokens = max_tokens
        self._device = device
        self.num_cut_captions = 0
        parts = {part: str(Path(folder) / part) for part in (_CLIP, _CLIP_TOKENIZER, _T5, _T5_TOKENIZER)}
        torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        self._t5_tokenizer, t5 = load_t5(parts[_T5], parts[_T5_TOKENIZER], torch_dtype)
        self._clip_tokenizer, clip = load_clip(parts[_CLIP], parts[_CLIP_TOKENIZER], torch_dtype)
        _check_vocabulary(parts[_T5_TOKENIZER], self._t5_tokenizer, t5)
        _check_vocabulary(parts[_CLIP_TOKENIZER], self._clip_tokenizer, clip)
        self._t5, self._clip = t5.to(device), clip.to(device)

    def fingerprint(self) -> dict[str, str]:
        """Name, hash of weights and tokenizers, limits and dtype."""
        return dict(self._fingerprint)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[TextFeatures]:
        """Encode captions, one at a time, so that none depends on its neighbours; '' is the null prompt.

        Returns:
            Per caption, tokens n d with n <= max_tokens and pooled p, float32 on the CPU.

        Raises:
            ValueError: what is no text.
        """
        check_captions(captions)
        return [self._encode_one(caption) for caption in captions]

    def count_tokens(self, caption: str) -> int:
        """T5's tokens of the whole caption, end marker counted; CLIP's own limit only shortens the pooled vector."""
        return num_tokens(self._t5_tokenizer, caption)

    def _encode_one(self, caption: str) -> TextFeatures:
        t5_ids, is_cut = tokenize(self._t5_tokenizer, caption, self._max_tokens)
        clip_ids, is_clip_cut = tokenize(self._clip_tokenizer, caption, MAX_CLIP_TOKENS)
        self.num_cut_captions += is_cut or is_clip_cut
        tokens: Tensor = self._t5(input_ids=torch.tensor([t5_ids], device=self._device)).last_hidden_state[0]  # n d
        pooled: Tensor = self._clip(input_ids=torch.tensor([clip_ids], device=self._device)).pooler_output[0]  # p
        return TextFeatures(tokens=tokens.float().cpu(), pooled=pooled.float().cpu())


def count_t5_tokens(folder: str) -> Callable[[str], int]:
    """`T5ClipEncoder.count_tokens` with the tokenizer alone: no weights are read.

    Raises:
        ConfigError: a part of the folder is missing; the message names it.
        DataError: the tokenizer is damaged.
    """
    _files(Path(folder))
    return functools.partial(num_tokens, load_t5_tokenizer(str(Path(folder) / _T5_TOKENIZER)))


def t5_clip_fingerprint(folder: str, max_tokens: int, dtype: str) -> dict[str, str]:
    """What decides the features, without loading a model.

    Raises:
        ConfigError: a part is missing; the message names it.
        DataError: an index of shards that cannot be read.
    """
    digest = hashlib.sha256()
    root = Path(folder)
    for file in _files(root):
        stat = file.stat()
        digest.update(f"{file.relative_to(root)} {_file_sha256(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return {
        "text_encoder": T5ClipEncoder.name,
        "text_encoder_weights_sha256": digest.hexdigest(),
        "text_encoder_config": (
            f"T5's last hidden state, at most {max_tokens} tokens; CLIP's pooled text, at most {MAX_CLIP_TOKENS}; run "
            f"in {dtype}"
        ),
    }


@functools.lru_cache(maxsize=64)
def _file_sha256(file: Path, size_bytes: int, changed_ns: int) -> str:
    """Hash of a file. A job asks several times, and T5-XXL is 10 to 20 GB; a file that changed is read again."""
    return sha256(str(file))


def _files(root: Path) -> list[Path]:
    """Every file that decides the features, sorted.

    Raises:
        ConfigError: one is missing.
        DataError: an index of shards that cannot be read.
    """
    if not root.is_dir():
        raise ConfigError(
            f"text_encoder.weights={storage.shown(str(root))}: no such local folder; name PyramidFlow's released "
            f"folder, which holds {_CLIP}, {_CLIP_TOKENIZER}, {_T5} and {_T5_TOKENIZER}. Nothing is downloaded."
        )
    files = [*_model_files(root, _CLIP), *_model_files(root, _T5)]
    files += _tokenizer_files(root, _CLIP_TOKENIZER, (("tokenizer.json",), ("vocab.json", "merges.txt")))
    files += _tokenizer_files(root, _T5_TOKENIZER, (("tokenizer.json",),))
    return sorted(files)


def _model_files(root: Path, part: str) -> Iterator[Path]:
    yield _require(root, part, "config.json")
    if not (root / part / _INDEX).is_file() or (root / part / _WEIGHTS).is_file():
        yield _require(root, part, _WEIGHTS, f" (nor {_INDEX})")
        return
    index = root / part / _INDEX
    yield index
    try:
        shards = sorted(set(storage.read_json(str(index))["weight_map"].values()))
    # ValueError: no JSON; the others: JSON of another shape
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: no index of shards ({type(error).__name__}: {error}); copy it again.") from error
    for shard in shards:
        yield _require(root, part, str(shard), f", which {_INDEX} names")


def _tokenizer_files(root: Path, part: str, choices: tuple[tuple[str, ...], ...]) -> Iterator[Path]:
    """The first choice of which a file is there, complete; and what may stand beside it."""
    names = next((names for names in choices if (root / part / names[0]).is_file()), None)
    others = "".join(f" (nor {' with '.join(names)})" for names in choices[1:])
    for name in names or choices[0]:
        yield _require(root, part, name, "" if names else others)
    yield from (root / part / name for name in _TOKENIZER_EXTRAS if (root / part / name).is_file())


def _require(root: Path, part: str, name: str, remark: str = "") -> Path:
    file = root / part / name
    if not file.is_file():
        raise ConfigError(
            f"text_encoder.weights={root}: {part}/{name} is missing{remark}; give PyramidFlow's whole released folder. "
            "Nothing is downloaded."
        )
    return file


def _check_weights(file: Path) -> None:
    """Look at a weights file before transformers does, whose own errors name no file."""
    for name, layout in read_layout(str(file)).items():
        if layout.dtype not in DTYPES:
            raise DataError(f"{file}: {name} is {layout.dtype}; weights are {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")


def _check_vocabulary(folder: str, tokenizer: Any, model: Any) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(
            f"{folder}: gives {len(tokenizer)} token ids, but its model knows {model.config.vocab_size}; take the "
            "tokenizer of the same release."
        )
