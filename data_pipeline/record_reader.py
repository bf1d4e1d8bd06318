"""Reads the records that a loader has planned: several at a time, checked, once more where a read went wrong.

A read that fails for a moment is asked again below (`object_store.ask`); one that comes back short or wrong is made
again here before the record counts as damaged, since a transfer can spoil what a disk keeps whole.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

from data_pipeline.cache_manifest import shard_path
from data_pipeline.cache_record import CacheRecord, CorruptRecordError
from data_pipeline.host_files import SharedReads
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import RecordPlace
from data_pipeline.record_bytes import RecordBytes, new_buffer, require_crc32
from m4v_dist import storage

_MAX_READS = 3


@dataclass
class ReadCounts:
    """What a rank read since it began, what it read ahead too.

    Args:
        num_reads: of records from the storage.
        read_bytes: of these.
        num_reread: reads that were made again, because they had come back short or wrong.
        num_saved: records that were needed and not read: another slot of the step, or another rank of the host, had.
    """

    num_reads: int = 0
    read_bytes: int = 0
    num_reread: int = 0
    num_saved: int = 0


class RecordReader:
    """Reads records of a cache.

    Args:
        cache: open.
        reads_in_flight: threads that read at the same time.
        shared: where ranks of this host leave what others want too; None: each reads for itself.
    """

    def __init__(self, cache: LatentCache, reads_in_flight: int, shared: SharedReads | None = None) -> None:
        self._cache = cache
        self._shared = shared
        self._counts = ReadCounts()
        self._lock = threading.Lock()
        self._reads_in_flight = reads_in_flight
        self._pool: ThreadPoolExecutor | None = None

    def start(self, source: str, record: int, *, is_shared: bool) -> "Future[RecordBytes]":
        """Read in a thread; see `read`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._reads_in_flight, thread_name_prefix="loader-read")
        return self._pool.submit(self.read, source, record, is_shared=is_shared)

    def read(self, source: str, record: int, *, is_shared: bool = False) -> RecordBytes:
        """Read a record, checked.

        Args:
            source, record: position in the source's table.
            is_shared: whether another rank of this host wants it too.

        Raises:
            CorruptRecordError: missing, or each time cut short or with another checksum.
            OSError: the storage failed: the record may be whole.
        """
        place = self._cache.table(source).place(record)
        for number in range(_MAX_READS):
            try:
                # what another rank has read may be what is wrong
                return self._read_once(place, is_shared=is_shared and number == 0)
            except FileNotFoundError as error:
                raise CorruptRecordError(place, str(error)) from error
            except (CorruptRecordError, EOFError) as error:
                damage = error
            if number < _MAX_READS - 1:
                self._count(num_reread=1)
        raise damage if isinstance(damage, CorruptRecordError) else CorruptRecordError(place, str(damage)) from damage

    def take(self, read: RecordBytes, caption: int) -> CacheRecord:
        """A record that was read, with one of its captions.

        Raises:
            CorruptRecordError: it has no such caption.
            DataError: it has the text of another encoder.
        """
        text = read.text(caption)
        self._cache.require_text(text, read.place, caption)
        return CacheRecord(read.latents, text)

    def count_saved(self, number: int) -> None:
        """Count records that a step needs several times and reads once."""
        self._count(num_saved=number)

    @property
    def counts(self) -> Mapping[str, int]:
        """`ReadCounts`, by name."""
        with self._lock:
            return asdict(self._counts)

    def close(self) -> None:
        """End the threads, after the reads under way, until the next `start`; what was left for others goes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        if self._shared is not None:
            self._shared.close()

    def _read_once(self, place: RecordPlace, *, is_shared: bool) -> RecordBytes:
        data = new_buffer(place.size_bytes)
        buffer = data.numpy().data
        if self._shared is None or not is_shared:
            self._load(place, buffer)
        elif self._shared.fill(place.checksum, buffer, lambda buffer: self._load(place, buffer, is_left=True)):
            try:
                read = RecordBytes(data, place)
            except CorruptRecordError:
                self._shared.forget(place.checksum)
                raise
            self._count(num_saved=1)
            return read
        return RecordBytes(data, place)

    def _load(self, place: RecordPlace, buffer: memoryview, *, is_left: bool = False) -> None:
        storage.read_into(shard_path(self._cache.path, place.shard), place.offset_bytes, buffer)
        self._count(num_reads=1, read_bytes=len(buffer))
        if is_left:
            # before others find it
            require_crc32(buffer, place)

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self._counts, name, getattr(self._counts, name) + number)
