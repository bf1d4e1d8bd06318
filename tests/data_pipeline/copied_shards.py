"""A precompute of many equal shards, to be killed in the middle: its config for a job, and its cache undisturbed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.captions import Caption
from data_pipeline.pack import RawClip, write_shards
from data_pipeline.precompute_plan import PrecomputePlan
from m4v_dist import storage
from m4v_dist.config.load import parse_config
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.made_cache import moving_blocks
from tests.data_pipeline.run_here import run_here
from tests.integration.small_run import small_values, to_toml


@dataclass(frozen=True)
class CopiedShards:
    """Raw shards of the same clip and the same broken file each.

    Args:
        folder: where they stand, in `raw/`.
        num_shards: copies.
    """

    folder: Path
    num_shards: int

    def write(self) -> None:
        """Write them."""
        video = encode_mp4(moving_blocks(0, 18), 12.0)
        records = [
            record
            for number in range(self.num_shards)
            for record in (
                RawClip(f"sound{number:03d}", "mp4", video, (Caption("blocks"),)),
                RawClip(f"broken{number:03d}", "mp4", b"no video", (Caption("nothing"),)),
            )
        ]
        write_shards(records, f"{self.folder}/raw/%03d.tar", 2)

    def values(self, cache: str, raw: str | None = None, **precompute: Any) -> dict[str, Any]:
        """The config's values; `raw` is another place of the shards."""
        values = small_values(str(self.folder / "run"), cache)
        pattern = f"{raw or self.folder / 'raw'}/{{000..{self.num_shards - 1:03d}}}.tar"
        values["sources"] = [{"name": "clips", "shards": pattern, "media": "video", "licence": "made up"}]
        values["curriculum"] = [{**stage, "weights": {"clips": 1.0}} for stage in values["curriculum"]]
        values["precompute"] |= {"max_bad_fraction": 0.5, "num_retries": 0, **precompute}
        return values

    def config(self, cache: str, **precompute: Any) -> str:
        """Path of the job's TOML."""
        config = parse_config(self.values(cache, **precompute), where="test")
        path = self.folder / "precompute.toml"
        path.write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
        return str(path)

    def plan(self, cache: str, raw: str | None = None, **precompute: Any) -> PrecomputePlan:
        """The same for `run_precompute`."""
        config = parse_config(self.values(cache, raw, **precompute), where="test")
        return PrecomputePlan(config.sources, config.precompute, config.codec, config.text_encoder)

    def upload(self, bucket: str) -> str:
        """Put them into a store as well; returns the folder."""
        for path in sorted((self.folder / "raw").iterdir()):
            storage.write_bytes(f"{bucket}/raw/{path.name}", path.read_bytes())
        return f"{bucket}/raw"

    def undisturbed(self) -> dict[str, bytes]:
        """Files of the cache that nothing happened to."""
        cache = self.folder / "undisturbed"
        assert run_here(self.plan(str(cache))).report["kept"] == self.num_shards
        return files_of(cache)


def files_of(cache: Path) -> dict[str, bytes]:
    """What a cache holds, by path: all but who worked on it, and how fast."""
    files = {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    return {path: data for path, data in files.items() if not path.startswith("leases/") and path != "report.json"}


def remote_files_of(cache: str) -> dict[str, bytes]:
    """The same of a cache in a store."""
    names = [f"{folder}/{name}" for folder in ("index", "shards") for name in storage.list_folder(f"{cache}/{folder}")]
    names += [name for name in storage.list_folder(cache) if name not in {"index", "shards", "leases", "report.json"}]
    return {name: storage.read_bytes(f"{cache}/{name}") for name in names}
