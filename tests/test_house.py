"""The house of m4v_dist/README.md as a test: imports point down, each dependency has one door, few files reach far."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOOR_1 = {
    "errors", "stop_request", "retries", "durable", "batch", "object_store", "storage", "tensor_files", "weights_file",
    "lease", "config",
}  # fmt: skip
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "stop_request": set(),
    "batch": set(),
    "retries": set(),
    "object_store": {"retries", "errors"},
    "durable": set(),
    "storage": {"object_store", "durable", "errors"},
    "tensor_files": {"storage"},
    "weights_file": {"storage", "tensor_files", "errors"},
    "lease": {"storage", "retries", "errors"},
    "config": {"errors"},
    "kernels": set(),
    "parallel": {"config", "errors"},
    "blocks": {"kernels", "parallel", "config", "errors"},
    "model": {"blocks", "kernels", "parallel", "config", "batch", "storage", "tensor_files", "weights_file", "errors"},
    "frozen": {"config", "storage", "tensor_files", "weights_file", "batch", "errors"},
    "objective": {"batch", "config", "errors"},
    "sampling": {"objective", "batch", "config", "errors"},
    "report": {"config", "storage", "errors"},
    "trainer": {"parallel", "batch", "config", "storage", "tensor_files", "lease", "retries", "errors", "stop_request"},
    "launch": {"config", "storage", "retries", "errors", "stop_request"},
    "bench": {
        "model",
        "blocks",
        "kernels",
        "parallel",
        "objective",
        "sampling",
        "data_pipeline",
        "frozen",
        "batch",
        "config",
        "storage",
        "tensor_files",
        "lease",
        "errors",
    },
    "data_pipeline": {"frozen", "batch", "config", "storage", "tensor_files", "lease", "errors"},
}
"""Which rooms a room may import, itself left out. `jobs` may import all; nobody imports `jobs`."""

DOORS: dict[str, set[str]] = {
    "s3fs": {"m4v_dist/object_store.py"},
    "botocore": {"m4v_dist/object_store.py"},
    "aiohttp": {"m4v_dist/object_store.py"},
    "safetensors": {"m4v_dist/tensor_files.py"},
    "pydantic": {
        f"m4v_dist/config/{file}.py"
        for file in (
            "settings",
            "model_settings",
            "data_settings",
            "curation_settings",
            "training_settings",
            "schema",
            "load",
        )
    },
    "triton": {
        f"m4v_dist/kernels/{file}.py"
        for file in ("scan_triton", "scan_triton_forward", "scan_triton_backward", "conv1d_triton")
    },
    "mamba_ssm": {"m4v_dist/kernels/scan_mamba_ssm.py"},
    "deepspeed": {"m4v_dist/trainer/deepspeed_engine.py"},
    "wandb": {"m4v_dist/trainer/metrics.py"},
    "ray": {
        "m4v_dist/launch/ray_session.py",
        "m4v_dist/launch/ray_workers.py",
        "m4v_dist/launch/validation.py",
        "m4v_dist/launch/controller_watch.py",
        "data_pipeline/ray_pool.py",
    },
    "pyarrow": {f"data_pipeline/{file}.py" for file in ("manifest", "index_table", "clip_list")}
    | {"m4v_dist/bench/index_times.py"},
    "cv2": {"data_pipeline/picture_scores.py"},
    "scenedetect": {"data_pipeline/scene_cuts.py"},
    "decord": {"data_pipeline/decode_decord.py", "m4v_dist/bench/decode_times.py"},
    "torchcodec": {"data_pipeline/decode_torchcodec.py", "m4v_dist/bench/decode_times.py"},
    "webdataset": {"data_pipeline/pack.py", "m4v_dist/bench/loader_contestants.py"},
    "streaming": {"m4v_dist/bench/loader_contestants.py"},
    "av": {
        "m4v_dist/frozen/video_file.py",
        "m4v_dist/frozen/video_facts.py",
        "m4v_dist/frozen/video_stream.py",
        "m4v_dist/bench/decode_times.py",
    },
    "PIL": {"m4v_dist/frozen/video_file.py", "m4v_dist/frozen/contact_sheet.py"},
    "transformers": {"m4v_dist/frozen/pretrained_text.py"},
    "matplotlib": {"m4v_dist/report/plots.py"},
    "jinja2": {"m4v_dist/report/page.py"},
}
"""The one door of each dependency: the only files that import it."""

NEVER_REACHES: dict[str, set[str]] = {
    "data_pipeline/loader.py": {
        "data_pipeline.decode", "data_pipeline.decoder_pool", "data_pipeline.encode", "m4v_dist.frozen",
        "webdataset", "decord", "av", "PIL", "transformers", "ray",
    },
}  # fmt: skip
"""What a file must not import, nor any file that it imports: training needs nothing of what made its cache."""
REACHES_ONLY: dict[str, set[str]] = {
    "data_pipeline/mixture.py": {"numpy", "data_pipeline.permutation"},
    "m4v_dist/config/": {"pydantic", "m4v_dist.config", "m4v_dist.errors"},
    "m4v_dist/kernels/": {"torch", "einops", "triton", "mamba_ssm", "m4v_dist.kernels"},
}
"""All that a file, or the files of a folder, may import, those that they import counted; the standard library aside."""


def _sources() -> list[Path]:
    return sorted(path for folder in ("m4v_dist", "data_pipeline", "jobs") for path in (ROOT / folder).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full path"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "m4v_dist":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in {"data_pipeline", "jobs"} else None


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _modules() -> dict[str, Path]:
    """Every file of ours by the name that it is imported by."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in _sources()}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def _reached(path: Path) -> dict[str, str]:
    """What a file imports and what that imports in turn: module of ours, or package of others, to the way there."""
    modules = _modules()
    found: dict[str, str] = {}
    waiting = [(path, _name(path))]
    while waiting:
        user, way = waiting.pop()
        for module in _imports(user):
            parts = module.split(".")
            # whoever imports a.b runs a as well
            targets = {".".join(parts[:end]) for end in range(1, len(parts) + 1)} & modules.keys()
            for target in targets or {parts[0]}:
                if target in found or target in sys.stdlib_module_names or target in {"m4v_dist", "data_pipeline"}:
                    continue
                found[target] = f"{way} > {target}"
                if target in modules:
                    waiting.append((modules[target], found[target]))
    return found


def _is_in(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("path", _sources(), ids=_name)
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    room = _room(".".join(parts))
    if room is None or room == "jobs" or room == "__init__":
        return
    used = {_room(module) for module in _imports(path)} - {None, room, "__init__"}
    stray = {target for target in used if target not in MAY_IMPORT[room]}
    assert not stray, f"{_name(path)} ({room}) may not import {sorted(map(str, stray))}"


@pytest.mark.parametrize("dependency", sorted(DOORS))
def test_dependency_has_one_door(dependency: str) -> None:
    users = {_name(path) for path in _sources() if dependency in {name.split(".")[0] for name in _imports(path)}}
    assert users <= DOORS[dependency], f"{dependency} is imported outside its door: {sorted(users - DOORS[dependency])}"
    unused = DOORS[dependency] - users
    assert not unused, f"{dependency} is not imported by its door {sorted(unused)}"


@pytest.mark.parametrize("name", sorted(NEVER_REACHES))
def test_a_file_never_reaches_what_it_must_do_without(name: str) -> None:
    gone = {place for place in NEVER_REACHES[name] if _room(place)} - _modules().keys()
    assert not gone, f"{sorted(gone)} moved; NEVER_REACHES forbids what is not there"
    ways = [way for module, way in _reached(ROOT / name).items() if _is_in(module, NEVER_REACHES[name])]
    assert not ways, "\n".join(ways)


@pytest.mark.parametrize("place", sorted(REACHES_ONLY))
def test_a_file_reaches_no_more_than_its_list(place: str) -> None:
    paths = [path for path in _sources() if _name(path).startswith(place)]
    assert paths, f"{place} is gone; take it off REACHES_ONLY"
    ways = [way for path in paths for module, way in _reached(path).items() if not _is_in(module, REACHES_ONLY[place])]
    assert not ways, "\n".join(ways)


def test_every_room_is_in_use() -> None:
    """A package with nothing but an __init__ is a promise and no room."""
    rooms = {path.parent for path in _sources() if path.name == "__init__.py"}
    empty = [_name(room) for room in rooms if not any(p.name != "__init__.py" for p in room.rglob("*.py"))]
    assert not empty, f"nothing lives in {sorted(empty)}: remove them until something does"


def test_every_room_has_a_rule() -> None:
    rooms = {_room(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in _sources()}
    assert rooms - {None, "__init__", "jobs"} <= set(MAY_IMPORT)


def test_files_import_without_a_circle() -> None:
    """No file reaches itself through imports, those inside functions counted."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in _sources()}
    graph = {name: {m for m in _imports(path) if m in names and m != name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' > '.join((*trail, name))}"
        if name in done:
            return
        for target in graph[name]:
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())
