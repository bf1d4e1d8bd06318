"""One record of the cache: its three members as bytes and back, and the checksum over them.

Legend: `c` channels, `t` latents in time, `h` `w` grid, `n` text tokens, `d` text width.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.manifest import IndexRow, RecordPlace
from m4v_dist import tensor_files
from m4v_dist.batch import TextFeatures

LATENTS, TEXT, _JSON = "latents.safetensors", "text.safetensors", "json"


class CorruptRecordError(Exception):
    """A record's bytes are not those that were written; the message names key, shard and reason.

    Attributes:
        shard: name of the cache's tar that holds it.
    """

    def __init__(self, row: IndexRow | RecordPlace, reason: str) -> None:
        super().__init__(f"{row.source}/{row.key} in {row.shard}: {reason}")
        self.shard = row.shard


@dataclass(frozen=True)
class CacheRecord:
    """One record with one of its captions: latents c t h w bfloat16, un-normalised, and text without padding."""

    latents: Tensor
    text: TextFeatures


def record_members(row: IndexRow, latents: Tensor, texts: Sequence[TextFeatures]) -> list[tuple[str, bytes]]:
    """Names and bytes of a record's members, in their order in the tar; see `CacheShardWriter.add`."""
    described = {
        "key": row.key, "source": row.source, "captions": row.captions, "caption_weights": row.caption_weights,
        "fps": row.fps, "num_frames": row.num_frames, "height_px": row.height_px, "width_px": row.width_px,
    }  # fmt: skip
    return [
        (f"{row.key}.{LATENTS}", tensor_files.tensors_to_bytes({"latents": latents})),
        (f"{row.key}.{TEXT}", texts_to_bytes(texts)),
        (f"{row.key}.{_JSON}", json.dumps(described, sort_keys=True).encode()),
    ]


def parse_record(data: bytes, row: IndexRow) -> tuple[Tensor, tuple[TextFeatures, ...]]:
    """Latents c t h w, and the features of each caption, from a record's byte range in the tar.

    Raises:
        CorruptRecordError: other bytes than were written.
    """
    digest = new_digest()
    digest.update(data)
    if digest.hexdigest() != row.checksum:
        raise CorruptRecordError(row, "checksum differs from the index")
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = {member.name.removeprefix(f"{row.key}."): tar.extractfile(member) for member in tar}
            latents_file, text_file = members[LATENTS], members[TEXT]
            assert latents_file is not None and text_file is not None
            latents = tensor_files.tensors_from_bytes(latents_file.read())["latents"]
            return latents, texts_from_bytes(text_file.read())
    except (tarfile.TarError, KeyError) as error:
        raise CorruptRecordError(row, f"{type(error).__name__}: {error}") from error


def texts_to_bytes(texts: Sequence[TextFeatures]) -> bytes:
    """Features of several captions as safetensors, `tokens.0`, `pooled.0`, `tokens.1` and so on."""
    tensors: dict[str, Tensor] = {}
    for number, text in enumerate(texts):
        # tokens are the bulk of a T5 record and come from a bf16 net; there is no mask, because there is no padding
        tensors[f"tokens.{number}"] = text.tokens.to(torch.bfloat16)
        tensors[f"pooled.{number}"] = text.pooled.float()
    return tensor_files.tensors_to_bytes(tensors)


def texts_from_bytes(data: bytes) -> tuple[TextFeatures, ...]:
    """The features that `texts_to_bytes` wrote."""
    tensors = tensor_files.tensors_from_bytes(data)
    return tuple(TextFeatures(tensors[f"tokens.{n}"], tensors[f"pooled.{n}"]) for n in range(len(tensors) // 2))


def new_digest() -> "hashlib.blake2b":
    """The digest of every checksum of a cache, empty."""
    return hashlib.blake2b(digest_size=16)
