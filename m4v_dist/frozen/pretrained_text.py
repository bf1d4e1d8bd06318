"""Text models and their tokenizers from local folders, strictly: the one door of transformers.

Nothing is downloaded: a folder is a path, and what is missing in it is an error. transformers fills missing weights
with random numbers and a warning; here they are an error too.

Legend: `n` tokens of a caption, its markers counted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from m4v_dist.errors import DataError

_NUM_NAMED = 3


def load_bert(folder: str) -> tuple[Any, Any]:
    """Tokenizer and model of a BERT without its pooler, in float32.

    Raises:
        DataError: the folder's files are damaged, or of another network.
    """
    from transformers import BertModel

    return (
        load_bert_tokenizer(folder),
        _load_model(BertModel, folder, torch.float32, may_hold=("pooler.",), add_pooling_layer=False),
    )


def load_t5(folder: str, tokenizer_folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and encoder of a T5; see `load_bert`."""
    from transformers import T5EncoderModel

    return load_t5_tokenizer(tokenizer_folder), _load_model(T5EncoderModel, folder, dtype)


def load_bert_tokenizer(folder: str) -> Any:
    """The tokenizer of `load_bert` alone."""
    from transformers import AutoTokenizer

    return _load_tokenizer(AutoTokenizer, folder)


def load_t5_tokenizer(folder: str) -> Any:
    """The tokenizer of `load_t5` alone."""
    from transformers import T5Tokenizer

    return _load_tokenizer(T5Tokenizer, folder)


def load_clip(folder: str, tokenizer_folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and text model of a CLIP; see `load_bert`."""
    from transformers import CLIPTextModel, CLIPTokenizer

    return _load_tokenizer(CLIPTokenizer, tokenizer_folder), _load_model(CLIPTextModel, folder, dtype)


def check_captions(captions: Sequence[str]) -> None:
    """Check that captions are text.

    Raises:
        ValueError: one string instead of several, what is no string, or text that has no UTF-8.
    """
    if isinstance(captions, str):
        raise ValueError(f"text encoder: got the caption {captions!r} alone; give a list of captions.")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(
                f"text encoder: caption {number} is {type(caption).__name__} {caption!r}; a caption is text, '' if "
                "there is none."
            )
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text encoder: caption {number} {caption[:80]!r} is no text: {error.reason}.") from error


def tokenize(tokenizer: Any, caption: str, max_tokens: int) -> tuple[list[int], bool]:
    """Token ids of one caption with its markers, at most `max_tokens`, and whether it was cut; n.

    The closing marker stays when a caption is cut, as with transformers' own truncation.
    """
    ids = _ids(tokenizer, caption)
    if len(ids) <= max_tokens:
        return ids, False
    return [*ids[: max_tokens - 1], ids[-1]], True


def num_tokens(tokenizer: Any, caption: str) -> int:
    """Tokens of one whole caption with its markers."""
    return len(_ids(tokenizer, caption))


def _ids(tokenizer: Any, caption: str) -> list[int]:
    ids: list[int] = tokenizer(caption, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    return ids


def _load_tokenizer(tokenizer_class: Any, folder: str) -> Any:
    _make_quiet()
    try:
        return tokenizer_class.from_pretrained(str(Path(folder).absolute()), local_files_only=True)
    # OSError: no JSON; KeyError, TypeError, ValueError: JSON of another shape
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: holds no {tokenizer_class.__name__} ({_first_line(error)}).") from error


def _load_model(
    model_class: Any, folder: str, dtype: torch.dtype, *, may_hold: tuple[str, ...] = (), **settings: object
) -> Any:
    """A frozen model in eval mode; `may_hold` are beginnings of weights' names that the folder may have besides."""
    _make_quiet()
    try:
        # eager attention: its sums do not depend on which fused kernel a torch version picks
        model, found = model_class.from_pretrained(
            str(Path(folder).absolute()), local_files_only=True, attn_implementation="eager", dtype=dtype,
            output_loading_info=True, ignore_mismatched_sizes=True, **settings,
        )  # fmt: skip
    # OSError: no JSON; the others: JSON of another shape
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: holds no {model_class.__name__} ({_first_line(error)}).") from error
    problems = [
        *_describe("missing", found["missing_keys"]),
        *_describe("too many", (key for key in found["unexpected_keys"] if not key.startswith(may_hold or ("\0",)))),
        *_describe(
            "of another shape",
            (f"{key}: file {list(file)}, config {list(config)}" for key, file, config in found["mismatched_keys"]),
        ),
    ]
    if problems:
        raise DataError(
            f"{folder}: its weights are not those of its config.json's {model_class.__name__}: {'; '.join(problems)}. "
            "Copy the released folder again."
        )
    return model.eval().requires_grad_(False)


def _describe(what: str, entries: Any) -> list[str]:
    names = sorted(entries)
    more = f", and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return [f"{len(names)} {what} ({', '.join(names[:_NUM_NAMED])}{more})"] if names else []


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _make_quiet() -> None:
    from transformers.utils import logging as transformers_logging

    # its load report lists what is checked above, and what was left out on purpose
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
