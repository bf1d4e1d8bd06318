"""Lists of records as files: `source/key` a line, or the four columns that the pipeline's own lists have."""

from collections.abc import Iterable
from dataclasses import dataclass

from data_pipeline.pack import printable
from m4v_dist import storage
from m4v_dist.errors import DataError


@dataclass(frozen=True, order=True)
class RecordName:
    """A record of a cache: its source, which holds no slash, and its key, which may."""

    source: str
    key: str

    def __str__(self) -> str:
        return f"{self.source}/{self.key}"


@dataclass(frozen=True)
class ListedRecord:
    """A line of the pipeline's lists (quarantine.txt, damaged.txt): what is wrong with a record.

    Args:
        name: of the record.
        shard: name of the tar that holds it.
        error: why it is listed, printable.
    """

    name: RecordName
    shard: str
    error: str


def parse_name(text: str) -> RecordName:
    """Read `source/key`.

    Raises:
        ValueError: no slash, or nothing on one side of it.
    """
    source, slash, key = text.partition("/")
    if not (source and slash and key):
        raise ValueError(f"{text!r} is no record; write source/key")
    return RecordName(source, key)


def read_record_list(path: str) -> list[RecordName]:
    """Read a list of records, each once, in order; empty lines and lines that begin with # are passed over.

    Args:
        path: local or s3://. A line is `source/key`, or `source`, `shard`, `key`, `reason` apart by tabs.

    Raises:
        DataError: no such file, no UTF-8, or a line that is neither; the message has its number.
    """
    if not storage.exists(path):
        raise DataError(f"{storage.shown(path)}: no such list; give a file with one source/key a line.")
    try:
        lines = storage.read_bytes(path).decode().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 ({error}); write the list anew.") from error
    found: dict[RecordName, None] = {}
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        columns = line.split("\t")
        if len(columns) not in (1, 4):
            raise DataError(
                f"{path}, line {number}: has {len(columns)} columns; write source/key, or source, shard, key and "
                "reason apart by tabs, as quarantine.txt has them."
            )
        try:
            name = parse_name(line) if len(columns) == 1 else parse_name(f"{columns[0]}/{columns[2]}")
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}.") from error
        found[name] = None
    return list(found)


def write_listed(path: str, records: Iterable[ListedRecord]) -> None:
    """Write the four columns, so that the file can be given back to `read_record_list`."""
    lines = (
        f"{record.name.source}\t{record.shard}\t{record.name.key}\t{printable(record.error)}\n" for record in records
    )
    storage.write_bytes(path, "".join(lines).encode())
