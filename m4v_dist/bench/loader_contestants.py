"""Loaders that hand out the same records as the same tensors, each shuffling as well as it can: ours and its peers.

Each is a function of a `Task` that yields batches, lists of (latents, tokens, pooled). Ours and the raw files are
shuffled over all records, streaming within blocks of shards as its default does, webdataset by shards and a buffer.
Ours checks every record by a checksum, the others none.

The only file that imports streaming; webdataset comes in by a second door, since a peer that went through our code
would be none.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.latent_cache import LatentCache
from data_pipeline.loader import LatentLoader
from data_pipeline.slot_plan import SlotPlanner
from m4v_dist import storage, tensor_files
from m4v_dist.bench.loader_subject import LoaderCase, stored_records
from m4v_dist.config.data_settings import SourceSettings
from m4v_dist.config.training_settings import CurriculumStageSettings, ObjectiveSettings

Record = tuple[Tensor, Tensor, Tensor]
Batches = Iterator[list[Record]]

_SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class Task:
    """What a contestant reads, and with how much help.

    Args:
        case: the records.
        folder: of all forms, local or s3://; `cache`, `raw` and `mds` stand in it.
        scratch: a local folder for what a contestant caches.
        http: the same folder by http, where it is remote.
        num_workers: worker processes of the peers; 0: none. Ours takes threads.
        batch_size: records of a batch.
    """

    case: LoaderCase
    folder: str
    scratch: str
    http: str
    num_workers: int
    batch_size: int


def ours(task: Task) -> Batches:
    """The latent cache by slots, whole records."""
    loader = LatentLoader(
        make_planner(LatentCache.open(f"{task.folder}/cache"), task.case, task.batch_size),
        rank=0, world_size=1, prefetch_steps=4, reads_in_flight=max(1, 2 * task.num_workers),
    )  # fmt: skip
    loader.enter(0, 0)
    steps = loader.steps()
    try:
        for _ in range(task.case.num_records // task.batch_size):
            (micro,) = next(steps).micro_batches
            texts = [(text.tokens, text.pooled) for text in micro.text]
            yield [(latents, *text) for latents, text in zip(micro.latents, texts, strict=True)]
    finally:
        loader.close()


def make_planner(cache: LatentCache, case: LoaderCase, num_slots: int) -> SlotPlanner:
    """Every slot takes a whole record of its own."""
    source = SourceSettings(name="vid", shards="none", media="video", licence="none")
    stage = CurriculumStageSettings(
        name="all", num_steps=1_000_000, num_latents=case.latents[1], buckets=(case.bucket,), weights={"vid": 1.0},
        micro_batch_slots=num_slots,
    )  # fmt: skip
    return SlotPlanner(
        cache, sources=(source,), curriculum=(stage,), seed=0, num_slots=num_slots, group_size=1,
        objective=ObjectiveSettings(), choose_unit=lambda num_units, *_: num_units,
        num_segment_tokens=lambda *_: 1000, patch_size=2,
    )  # fmt: skip


def webdataset(task: Task) -> Batches:
    """The cache's own tars, shards shuffled and a buffer of records behind them."""
    import webdataset as wds

    curl = "pipe:curl -sf --aws-sigv4 aws:amz:us-east-1:s3 --user $AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY"
    shards = [
        f"{curl} {task.http}/cache/shards/{name}.tar" if task.http else f"{task.folder}/cache/shards/{name}.tar"
        for name in task.case.shards
    ]
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
        .shuffle(_SHUFFLE_BUFFER)
        .map(_decode_members)
        .batched(task.batch_size, collation_fn=list)
    )
    yield from wds.WebLoader(dataset, batch_size=None, num_workers=min(task.num_workers, len(shards)))


def _decode_members(sample: dict[str, bytes]) -> Record:
    return _decoded(sample["latents.safetensors"], sample["text.safetensors"])


class _RawFiles(Dataset[Record]):
    def __init__(self, folder: str, num_records: int) -> None:
        self._folder, self._num_records = folder, num_records

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, number: int) -> Record:
        parts = [storage.read_bytes(f"{self._folder}/{number:08d}.{name}.safetensors") for name in ("latents", "text")]
        return _decoded(*parts)


def raw_files(task: Task) -> Batches:
    """torch's DataLoader over two files a record, in a random order."""
    dataset = _RawFiles(f"{task.folder}/raw", task.case.num_records)
    yield from DataLoader(dataset, task.batch_size, shuffle=True, num_workers=task.num_workers, collate_fn=list)


def write_mds(case: LoaderCase, folder: str) -> None:
    """Write the records as mosaicml-streaming stores them."""
    import streaming

    with streaming.MDSWriter(out=folder, columns={"latents": "bytes", "text": "bytes"}) as writer:
        for members in stored_records(case):
            writer.write(members)


def streaming(task: Task) -> Batches:
    """mosaicml-streaming's dataset, shuffled by its default."""
    import streaming as mosaicml

    place = {"remote": f"{task.folder}/mds", "local": f"{task.scratch}/mds"} if task.http else {
        "local": f"{task.folder}/mds"
    }  # fmt: skip
    dataset = mosaicml.StreamingDataset(**place, shuffle=True, batch_size=task.batch_size)
    loader: DataLoader[Any] = DataLoader(
        dataset, task.batch_size, num_workers=task.num_workers, collate_fn=_decode_samples
    )
    yield from loader


def _decode_samples(samples: list[dict[str, bytes]]) -> list[Record]:
    return [_decoded(sample["latents"], sample["text"]) for sample in samples]


def _decoded(latents: bytes, text: bytes) -> Record:
    texts = tensor_files.tensors_from_bytes(text)
    return tensor_files.tensors_from_bytes(latents)["latents"], texts["tokens.0"], texts["pooled.0"]


CONTESTANTS: dict[str, Callable[[Task], Batches]] = {
    "ours": ours,
    "webdataset": webdataset,
    "mosaicml-streaming": streaming,
    "torch DataLoader, raw files": raw_files,
}


def has_streaming() -> bool:
    """Whether mosaicml-streaming is installed; it is none of our dependencies."""
    return find_spec("streaming") is not None


def check_is_whole(batches: list[Record], case: LoaderCase) -> int:
    """Bytes of the records of a batch, which must be whole."""
    for latents, tokens, pooled in batches:
        assert latents.shape == case.latents and tokens.shape == case.text and pooled.dtype == torch.float32
    return sum(tensor.nbytes for record in batches for tensor in record)
