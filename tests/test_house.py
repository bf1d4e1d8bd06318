"""The house of m4v_dist/README.md as a test: imports point down, and each dependency has one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOOR_1 = {"errors", "batch", "storage", "weights_file", "config"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "batch": set(),
    "storage": {"errors"},
    "weights_file": {"storage", "errors"},
    "config": {"errors"},
    "kernels": set(),
    "parallel": {"config", "errors"},
    "blocks": {"kernels", "parallel", "config", "errors"},
    "model": {"blocks", "kernels", "parallel", "config", "batch", "storage", "weights_file", "errors"},
    "frozen": {"config", "storage", "weights_file", "batch", "errors"},
    "objective": {"batch", "config", "errors"},
    "sampling": {"objective", "batch", "config", "errors"},
    "report": {"config", "storage", "errors"},
    "trainer": {"parallel", "batch", "config", "storage", "errors"},
    "launch": {"config", "storage", "errors"},
    "bench": {"model", "blocks", "objective", "config", "storage", "errors"},
    "data_pipeline": {"frozen", "batch", "config", "storage", "errors"},
}
"""Which rooms a room may import, itself left out. `jobs` may import all; nobody imports `jobs`."""

DOORS: dict[str, set[str]] = {
    "s3fs": {"m4v_dist/storage.py"},
    "botocore": {"m4v_dist/storage.py"},
    "safetensors": {"m4v_dist/storage.py"},
    "pydantic": {"m4v_dist/config/schema.py", "m4v_dist/config/load.py"},
    "triton": {"m4v_dist/kernels/scan_triton.py"},
    "mamba_ssm": {"m4v_dist/kernels/scan_mamba_ssm.py"},
    "deepspeed": {"m4v_dist/trainer/deepspeed_engine.py"},
    "wandb": {"m4v_dist/trainer/metrics.py"},
    "ray": {"m4v_dist/launch/ray_session.py", "m4v_dist/launch/ray_workers.py", "data_pipeline/pipeline.py"},
    "pyarrow": {"data_pipeline/manifest.py"},
    "decord": {"data_pipeline/decode.py"},
    "webdataset": {"data_pipeline/pack.py"},
    "av": {"m4v_dist/frozen/video_file.py"},
    "PIL": {"m4v_dist/frozen/video_file.py"},
    "transformers": {"m4v_dist/frozen/text_encoder.py"},
    "matplotlib": {"m4v_dist/report/plots.py"},
    "jinja2": {"m4v_dist/report/page.py"},
}
"""The one door of each dependency: the only files that import it."""
NOT_BUILT_YET = {"triton", "mamba_ssm"}
"""Dependencies whose door is kept free for a file that is still to come."""


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
    assert bool(unused) == (dependency in NOT_BUILT_YET), f"{dependency} is not imported by its door {sorted(unused)}"


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
