"""A record's bytes, read once into one buffer: checked by CRC-32, and its tensors as views of them.

What `cache_record.parse_record` does by tarfile and copies, for the loader, which reads every record of a run. The
writer lays a member out as a header block and its data, padded to a block (`deterministic_tar.py`); a key whose name
does not fit a header has more blocks, and goes the slow way.

Legend: `c` channels, `t` latents in time, `h` `w` grid, `n` text tokens, `d` text width.
"""

import io
import tarfile
import zlib

import torch
from torch import Tensor

from data_pipeline.cache_record import LATENTS, TEXT, CorruptRecordError
from data_pipeline.manifest import RecordPlace
from m4v_dist import tensor_files
from m4v_dist.batch import TextFeatures

_BLOCK = 512


class RecordBytes:
    """One record as it was read.

    Args:
        data: its byte range in the tar, uint8; not to be written while a tensor of it is in use.
        place: of the record.

    Attributes:
        place: as given.
        latents: c t h w, bfloat16, un-normalised; a view.

    Raises:
        CorruptRecordError: other bytes than were written.
    """

    def __init__(self, data: Tensor, place: RecordPlace) -> None:
        require_crc32(data.numpy().data, place)
        self.place = place
        try:
            members = members_of(data)
            self.latents = tensor_files.tensor_views(members[f"{place.key}.{LATENTS}"], ("latents",))["latents"]
            self._text = members[f"{place.key}.{TEXT}"]
        except (tarfile.TarError, KeyError, ValueError) as error:
            raise CorruptRecordError(place, f"{type(error).__name__}: {error}") from error

    def text(self, caption: int) -> TextFeatures:
        """Features of one caption: views.

        Raises:
            CorruptRecordError: it holds no such caption.
        """
        names = (f"tokens.{caption}", f"pooled.{caption}")
        try:
            tokens, pooled = tensor_files.tensor_views(self._text, names).values()
        except (KeyError, ValueError) as error:
            raise CorruptRecordError(self.place, f"caption {caption}: {type(error).__name__}: {error}") from error
        return TextFeatures(tokens, pooled)


def require_crc32(data: memoryview, place: RecordPlace) -> None:
    """Check a record's bytes.

    Raises:
        CorruptRecordError: they are not those that were written.
    """
    if zlib.crc32(data) != place.crc32:
        raise CorruptRecordError(place, "checksum differs from the index")


def members_of(data: Tensor) -> dict[str, Tensor]:
    """Members of a piece of a tar by name, views of it; by their headers, or by tarfile where that is not enough.

    Args:
        data: uint8; whole members, without the blocks that end a tar.

    Raises:
        tarfile.TarError, KeyError: no tar.
    """
    members: dict[str, Tensor] = {}
    at = 0
    while at < len(data):
        header = data[at : at + _BLOCK].numpy().tobytes()
        # a regular file whose name fits, in a header that says so; anything else is for who knows tars
        if len(header) < _BLOCK or header[257:262] != b"ustar" or header[156:157] != b"0" or header[345:346] != b"\0":
            return members_by_tarfile(data)
        name, size = header[:100].rstrip(b"\0").decode(), int(header[124:135], 8)
        members[name] = data[at + _BLOCK : at + _BLOCK + size]
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK
    return members


def members_by_tarfile(data: Tensor) -> dict[str, Tensor]:
    """As `members_of` says, by the standard library: its definition."""
    with tarfile.open(fileobj=io.BytesIO(data.numpy().tobytes()), mode="r:") as tar:
        return {m.name: data[m.offset_data : m.offset_data + m.size] for m in tar if m.isfile()}


def new_buffer(size_bytes: int) -> Tensor:
    """Memory for a record, uint8, not filled."""
    return torch.empty(size_bytes, dtype=torch.uint8)
