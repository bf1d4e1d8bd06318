"""A refused config names the cause once, and the key or the choice that was meant."""

from typing import Any

import pytest

from m4v_dist.config.explain import MAX_SHOWN
from m4v_dist.config.load import load_config, parse_config
from m4v_dist.config.presets import MODEL_PRESETS
from m4v_dist.errors import ConfigError
from tests.config.run_values import run_values


def _lines(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "run.toml")
    return str(caught.value).splitlines()


def _broken(dotted: str, value: Any) -> dict[str, Any]:
    """The small run with one key set; a number in `dotted` is a position."""
    values = run_values()
    *sections, key = dotted.split(".")
    target: Any = values
    for section in sections:
        target = target[int(section)] if section.isdecimal() else target.setdefault(section, {})
    target[key] = value
    return values


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("precompute.bucket", [], "precompute.buckets"),
        ("trainer.prompts", ["a cat"], "sampling.prompts"),
        ("sampling.cfg_dropout", 0.1, "objective.cfg_dropout"),
        ("model.gate", "sum", "model.ssm.gate"),
        ("curriculum.0.sources", [], "sources"),
        ("num_workers", 2, "launch.num_workers"),
        ("prompt", "a cat", "sampling.prompts"),
        ("learning_rate", 1e-4, "curriculum.N.learning_rate"),
        ("run.learning_rat", 1e-4, "curriculum.N.learning_rate"),
        ("trainer.num_steps", 5, "trainer.profile.num_steps, curriculum.N.num_steps or benchmark.num_steps"),
        ("trainer.seed", 1, "run.seed or sampling.seed"),
        ("trainer.name", "x", "run.name, sources.N.name or curriculum.N.name"),
        ("optimizer", {"learning_rate": 1e-4}, "curriculum.N.learning_rate"),
        ("trainr", {"zero_stage": 1}, "trainer"),
        ("curriculum.0.buckets.0.height", 64, "curriculum.0.buckets.0.height_px"),
        ("curriculum.0.nmu_steps", 3, "curriculum.0.num_steps"),
        ("source", "dit.pth", "sources or warm_start.source"),
        ("warm_start.checkpoint", "dit.pth", "warm_start.source"),
        ("warm_start.path", "dit.pth", "warm_start.source"),
    ],
)
def test_an_unknown_key_is_looked_for_in_every_section(key: str, value: Any, meant: str) -> None:
    (line,) = _lines(_broken(key, value))
    assert line.startswith(f"run.toml: unknown key {key}; did you mean {meant}?") and "Known here: " in line
    assert ("(N counts a list from 0.)" in line) == ("N" in meant.replace(",", ".").split("."))


def test_a_position_that_the_key_stands_at_is_kept_and_the_nearest_section_comes_first() -> None:
    (line,) = _lines(_broken("curriculum.0.height_px", 64))
    meant = (
        "curriculum.0.buckets.N.height_px, sources.N.buckets.N.height_px, precompute.buckets.N.height_px or "
        "sampling.height_px?"
    )
    assert f"did you mean {meant}" in line


def test_a_key_that_is_like_no_other_gets_no_suggestion() -> None:
    (line,) = _lines(_broken("trainer.batch_size", 4))
    assert line.startswith("run.toml: unknown key trainer.batch_size. Known here: betas, ")


def test_a_misspelt_key_is_not_missed_as_well() -> None:
    values = run_values()
    values["curriculum"][0]["num_step"] = values["curriculum"][0].pop("num_steps")
    values["modle"] = values.pop("model")
    names = sorted(line.split(";")[0] for line in _lines(values))
    assert names == ["run.toml: unknown key curriculum.0.num_step", "run.toml: unknown key modle"]


def test_a_missing_key_is_named() -> None:
    values = run_values()
    del values["run"]["folder"]
    assert _lines(values) == ["run.toml: run.folder is missing; add it."]


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("tyny", "'tyny' is not a choice; did you mean 'tiny'?"),
        ("huge", "'huge' is not a choice."),
        (3, "3 is not a choice."),
        (["tiny"], "['tiny'] is not a choice"),
    ],
)
def test_a_wrong_preset_is_the_only_complaint(preset: Any, words: str) -> None:
    (line,) = _lines(_broken("model.preset", preset))
    assert line.startswith(f"run.toml: model.preset: {words}")
    assert line.endswith("Choices: 'tiny', 'small' or 'm4v_2b'.") and all(f"'{name}'" in line for name in MODEL_PRESETS)


def test_a_wrong_preset_hides_no_other_fault_of_the_section() -> None:
    values = _broken("model.preset", "tyny")
    values["model"]["hiden_size"] = 64
    causes = [line.split(";")[0] for line in _lines(values)]
    assert causes == [
        "run.toml: model.preset: 'tyny' is not a choice",
        "run.toml: unknown key model.hiden_size",
    ]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("kernels.backend", "refrence", "did you mean 'reference'? Choices: 'reference', 'reference_chunked', "),
        ("kernels.backend", "TRITON", "did you mean 'triton'?"),
        ("trainer.zero_stage", "2", "'2' is not a choice; did you mean 2? Choices: 1, 2 or 3."),
        ("trainer.zero_stage", 5, "5 is not a choice. Choices: 1, 2 or 3."),
        (
            "curriculum.0.freeze",
            ["double_block"],
            "curriculum.0.freeze.0: 'double_block' is not a choice; did you mean",
        ),
    ],
)
def test_a_wrong_choice_lists_the_choices_and_the_nearest(key: str, value: Any, words: str) -> None:
    (line,) = _lines(_broken(key, value))
    assert words in line


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("curriculum", 3, "curriculum is a list of sections; write [[curriculum]] above the keys of each (got 3)."),
        ("sources", {"name": "x"}, "sources is a list of sections; write [[sources]]"),
        ("curriculum.0.buckets", 3, "curriculum.0.buckets is a list of sections; write [[curriculum.buckets]]"),
        ("sources", [], "sources needs at least 1 item (got [])."),
        ("trainer", 3, "trainer is a section, not a value; set keys of it (got 3). Known here: betas, "),
        ("trainer", [{"zero_stage": 1}], "trainer is a section, not a value"),
        ("model.ssm", 3, "model.ssm is a section, not a value; set keys of it (got 3). Known here: chunk_size, "),
        ("sampling.prompts", "a cat", "sampling.prompts is a list; write prompts = [...] (got 'a cat')."),
        ("trainer.betas", [1], "trainer.betas: item 1, counted from 0, is missing (got [1])."),
        ("curriculum.0.weights.clips", 0, "curriculum.0.weights.clips: Input should be greater than 0 (got 0)."),
        ("curriculum.0.num_steps", "abc", "curriculum.0.num_steps: Input should be a valid integer"),
        ("", 1, 'unknown key "".'),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line(key: str, value: Any, words: str) -> None:
    (line,) = _lines(_broken(key, value))
    assert line.startswith(f"run.toml: {words}")


def test_a_long_wrong_value_is_cut() -> None:
    (line,) = _lines(_broken("sampling.prompts", "x" * 1000))
    assert "xxx..." in line and len(line) < MAX_SHOWN + 80


CURRICULUM_BY_POSITION = "its items are named by position, from 0, as in curriculum.0.num_steps=..."


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("curriculum.0.nmu_steps=3", "unknown key curriculum.0.nmu_steps; did you mean curriculum.0.num_steps?"),
        ("curriculum.num_steps=3", f"'num_steps' is no position in curriculum, a list of 1; {CURRICULUM_BY_POSITION}"),
        ("curriculum.7.num_steps=3", f"'7' is no position in curriculum, a list of 1; {CURRICULUM_BY_POSITION}"),
        ("curriculum.-1.num_steps=3", f"'-1' is no position in curriculum, a list of 1; {CURRICULUM_BY_POSITION}"),
        ("curriculum.².num_steps=3", f"'²' is no position in curriculum, a list of 1; {CURRICULUM_BY_POSITION}"),
        ("sources.unseen.shards=x", "as in sources.1.shards=..."),
        ("curriculum.0=3", "curriculum.0 is a whole section; name a key in it, as in curriculum.0.key=..."),
        ("sampling.prompts.0=x", "sampling.prompts is a list of values; set all of it, as in sampling.prompts=['a']."),
        ("trainer.betas.0=0.5", "trainer.betas is a list; write betas = [...] (got {'0': 0.5})."),
        ("launch.num_workers.x=3", "launch.num_workers is a value, not a section; set it as launch.num_workers=..."),
        ("curriculum=3", "curriculum is a list of sections"),
        ("trainer..x=3", "'trainer..x=3' is not of the form section.key=value."),
        (".x=3", "'.x=3' is not of the form section.key=value."),
        ("trainer.=3", "'trainer.=3' is not of the form section.key=value."),
        ("trainer.zero_stage", "'trainer.zero_stage' is not of the form section.key=value."),
        ("=3", "'=3' is not of the form section.key=value."),
    ],
)
def test_a_bad_override_says_what_to_write(override: str, words: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("config") / "run.toml"
    file.write_text(TOML)
    with pytest.raises(ConfigError) as caught:
        load_config(str(file), [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


TOML = """
run = {name = "t", folder = "r"}
sources = [
    {name = "clips", shards = "a.tar", media = "video", licence = "MIT"},
    {name = "unseen", shards = "b.tar", media = "video", licence = "MIT", split = "held_out"},
]
precompute = {cache = "c", num_frames = 17, buckets = [{height_px = 64, width_px = 64}]}
model = {preset = "tiny"}
launch = {num_workers = 2}
sampling = {prompts = ["a"]}
[[curriculum]]
name = "v"
num_steps = 5
num_latents = 3
weights = {clips = 1.0}
buckets = [{height_px = 64, width_px = 64}]
"""
