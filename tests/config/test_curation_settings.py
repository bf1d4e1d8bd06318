"""Settings of curation: bounds, what contradicts itself by name, thresholds that nobody would ask."""

from typing import Any

import pytest

from m4v_dist.config.load import config_from_json, config_to_json, parse_config
from m4v_dist.errors import ConfigError
from tests.config.run_values import run_values


def test_curation_is_off_unless_asked_for() -> None:
    assert not parse_config(run_values(), "test").curation.enabled


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cut_ratio": -1.0}, ["curation.cut_ratio", "-1"]),
        ({"cut_change": 256.0}, ["curation.cut_change", "256"]),
        ({"long_scenes": "middle"}, ["curation.long_scenes", "'first' or 'split'", "'middle'"]),
        ({"num_actors": 0}, ["curation.num_actors"]),
        ({"timeout_s": 0.0}, ["curation.timeout_s"]),
        ({"thresholds": {"max_static_share": 1.5}}, ["curation.thresholds.max_static_share", "1.5"]),
        ({"thresholds": {"min_height_px": 0}}, ["curation.thresholds.min_height_px"]),
        ({"thresholds": {"min_sharpness": -0.1}}, ["curation.thresholds.min_sharpness"]),
        ({"thresholds": {"min_sharpnes": 1.0}}, ["did you mean curation.thresholds.min_sharpness?"]),
        (
            {"thresholds": {"min_motion": 3.0, "max_motion": 0.5}},
            ["min_motion=3 is above max_motion=0.5, which keeps nothing"],
        ),
        (
            {"thresholds": {"min_brightness": 0.9, "max_brightness": 0.1}},
            ["min_brightness=0.9 is above max_brightness=0.1"],
        ),
        # of the two only one is in the file: the default of the other is named too
        ({"thresholds": {"min_brightness": 0.99}}, ["min_brightness=0.99 is above max_brightness=0.96"]),
    ],
)
def test_what_is_out_of_bounds_or_keeps_nothing_is_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    values = run_values()
    values["curation"] = {"enabled": True} | change
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "run.toml")
    for word in ["run.toml", *words]:
        assert word in str(caught.value)


def test_a_sources_own_thresholds_stand_in_place_of_all_others() -> None:
    values = run_values()
    values["curation"] = {"enabled": True, "thresholds": {"min_sharpness": 50.0, "min_seconds": 3.0}}
    values["sources"][0]["thresholds"] = {"min_seconds": 2.0}
    config = parse_config(values, "run.toml")
    own = config.sources[0].thresholds
    assert own is not None and (own.min_seconds, own.min_sharpness) == (2.0, 10.0)
    assert config.sources[1].thresholds is None
    assert config_from_json(config_to_json(config)) == config


def test_thresholds_of_a_source_without_curation_are_refused() -> None:
    values = run_values()
    values["sources"][1]["thresholds"] = {"min_seconds": 2.0}
    with pytest.raises(ConfigError, match=r"sources \['unseen'\]: .*no effect while curation.enabled=false; set it to"):
        parse_config(values, "run.toml")
