"""The files of a latent cache, and its manifest: what it says, whether it is this version's and this run's.

Both who writes a cache and who reads it need this much.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from data_pipeline.cache_record import texts_from_bytes
from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from m4v_dist.errors import DataError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
NULL_PROMPT = "null_prompt.safetensors"
_REQUIRED = ("fingerprint", "spatial_stride", "null_prompt", "fragments", "sources")
"""Fields of the manifest that are read here."""


def shard_path(cache: str, name: str) -> str:
    """Where a shard's tar stands."""
    return storage.join(cache, "shards", f"{name}.tar")


def index_path(cache: str, name: str) -> str:
    """Where a shard's index fragment stands; it exists once the shard is committed."""
    return storage.join(cache, "index", f"{name}.parquet")


def how_to_redo(cache: str, shards: Iterable[str]) -> str:
    """What makes the precompute do these shards of a cache anew."""
    fragments = sorted({index_path(cache, shard) for shard in shards})
    return f"remove {', '.join(fragments[:5])}, and run jobs.precompute_latents again"


def fragment_paths(cache: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Paths of the index fragments that a manifest names, by name."""
    return {name: index_path(cache, name) for name in manifest["fragments"]}


def read_manifest(cache: str) -> dict[str, Any] | None:
    """Read a cache's manifest; None where there is none."""
    path = storage.join(cache, MANIFEST)
    if not storage.exists(path):
        return None
    try:
        manifest = storage.read_json(path)
    except ValueError as error:
        raise DataError(str(error)) from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path}: is no manifest, but {type(manifest).__name__}; run jobs.precompute_latents again.")
    return manifest


def require_manifest(cache: str) -> dict[str, Any]:
    """Read the manifest of a finished cache.

    Raises:
        DataError: there is none, it is of another format version, or it lacks a field.
    """
    manifest = read_manifest(cache)
    if manifest is None:
        raise DataError(
            f"{storage.shown(cache)}: no finished latent cache (no {MANIFEST}); run jobs.precompute_latents first."
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{cache}: cache format_version is {manifest.get('format_version')}, this code reads {FORMAT_VERSION}; "
            "precompute into a new folder."
        )
    missing = [name for name in _REQUIRED if name not in manifest]
    if missing:
        raise DataError(
            f"{storage.join(cache, MANIFEST)}: has no {', '.join(missing)}; it is damaged: remove it, and run "
            "jobs.precompute_latents again, which encodes no clip twice."
        )
    return manifest


def read_null_text(cache: str, manifest: Mapping[str, Any]) -> TextFeatures:
    """Read the empty prompt's features.

    Raises:
        DataError: the file is missing.
    """
    path = storage.join(cache, manifest["null_prompt"])
    try:
        return texts_from_bytes(storage.read_bytes(path))[0]
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: the empty prompt's features are missing; run jobs.precompute_latents again, which writes them "
            "anew and encodes no clip twice."
        ) from error


def require_fingerprint(cache: str, manifest: Mapping[str, Any], fingerprint: Mapping[str, str]) -> None:
    """Check that a cache was made by these encoders.

    Raises:
        DataError: a field differs; the message names it with both values.
    """
    made_by = manifest["fingerprint"]
    differing = [name for name in sorted(fingerprint) if made_by.get(name) != fingerprint[name]]
    if differing:
        lines = "; ".join(
            f"{name}: cache has {made_by.get(name)!r}, run has {fingerprint[name]!r}" for name in differing
        )
        raise DataError(
            f"{cache}: the cache was made by another codec or text encoder ({lines}); "
            "use the settings it was made with, or precompute into a new folder."
        )
