"""The commands that the pages show can be given as they stand: the verb exists, and its config and overrides load."""

import re
import shlex
from pathlib import Path
from string import Template

import pytest

from jobs import benchmark, cli, demo, fit_codec, inspect_cache
from m4v_dist.config.load import load_config

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "jobs/README.md", "data_pipeline/README.md")
NO_CONFIG = {"fit_codec"}
"""Verbs with a command line of their own."""


def _text(page: str) -> str:
    """A page with continued lines joined, and with the shell variables that it sets itself filled in."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    variables = dict(re.findall(r"^ *([A-Z]+)=(\S+)", text, flags=re.MULTILINE))
    return Template(text).safe_substitute(variables)


def _commands(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """(verb, arguments) of each `python -m jobs.<verb>` of a page, in a block or in backticks; a `<verb>` is none."""
    found = re.findall(r"python -m jobs\.(\w+)([^`\n]*)", _text(page))
    return [(verb, tuple(shlex.split(rest, comments=True))) for verb, rest in found]


def _demo_overrides(page: str) -> list[tuple[str, ...]]:
    """The overrides of each `make demo` of a page, as make hands them on."""
    lines = re.findall(r"make demo\b([^`\n]*)", _text(page))
    words = [word for line in lines for word in shlex.split(line, comments=True)]
    return [tuple(shlex.split(word.removeprefix("ARGS="))) for word in words if word.startswith("ARGS=")]


COMMANDS = [(page, *command) for page in PAGES for command in _commands(page)]
DEMOS = [(page, overrides) for page in PAGES for overrides in _demo_overrides(page)]


def test_the_commands_of_the_pages_are_found() -> None:
    """Should the pages change their form, the tests below would check nothing."""
    assert {page for page, _, _ in COMMANDS} == set(PAGES)
    assert {verb for _, verb, _ in COMMANDS} >= {"precompute_latents", "train", "sample", "check_codec", "fit_codec"}
    cluster = next(arguments for page, verb, arguments in COMMANDS if page == "jobs/README.md" and len(arguments) > 5)
    assert "sources.0.shards=/shared/m4v/shards/clips-{000..002}.tar" in cluster
    assert any("curriculum.0.num_steps=10" in overrides for _, overrides in DEMOS)


@pytest.mark.parametrize(("page", "verb", "arguments"), COMMANDS)
def test_a_shown_command_names_a_verb_and_settings_that_load(
    page: str, verb: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert '__name__ == "__main__"' in (ROOT / "jobs" / f"{verb}.py").read_text(encoding="utf-8")
    if verb in NO_CONFIG:
        fit_codec.parse_arguments(arguments)
        return
    if verb == "benchmark":
        arguments = tuple(benchmark.parse_subject(arguments)[1])
    if verb == "inspect_cache":
        arguments = tuple(inspect_cache.parse_subject(arguments)[1])
    parsed = cli.parse_arguments(verb, "", arguments, default_config=demo.CONFIG if verb == "demo" else None)
    load_config(parsed.config, parsed.overrides)


@pytest.mark.parametrize(("page", "overrides"), DEMOS)
def test_a_shown_demo_would_start(
    page: str, overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the root: there, the folder of an earlier run could be in the way."""
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    parsed = cli.parse_arguments("demo", "", overrides, default_config=demo.CONFIG)
    demo.check_config(load_config(parsed.config, parsed.overrides))


@pytest.mark.parametrize("verb", sorted(path.stem for path in (ROOT / "jobs").glob("*.py")))
def test_each_verb_stands_in_the_table_of_commands(verb: str) -> None:
    is_verb = '__name__ == "__main__"' in (ROOT / "jobs" / f"{verb}.py").read_text(encoding="utf-8")
    assert is_verb == (f"\n| `{verb}` |" in _text("jobs/README.md"))
