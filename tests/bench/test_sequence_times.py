"""One sequence timed on ranks that share it, as `jobs.benchmark sequence` does on Ray workers."""

from typing import Any

from jobs.benchmark_on_workers import time_sequence_on_rank
from m4v_dist.bench.sequence_times import SequenceTimes, num_sequence_tokens, sequence_page
from m4v_dist.config.load import config_to_json, parse_config
from m4v_dist.config.schema import RunConfig
from tests.integration.small_run import small_values
from tests.trainer.ranks import run_ranks


def _config(num_ranks: int, **model: Any) -> RunConfig:
    values = small_values("run", "cache")
    values["model"] |= {"has_temporal_mask": False, **model}
    values["launch"] = {"num_workers": num_ranks, "sequence_parallel": num_ranks}
    values["benchmark"] = {"num_warm_up_steps": 1, "num_steps": 2}
    return parse_config(values, where="test")


def time_on_rank(config: str) -> SequenceTimes:
    return time_sequence_on_rank({"config": config}, tuple)


def test_every_rank_gives_the_slowest_one_s_time() -> None:
    one, two = (run_ranks(time_on_rank, count, config_to_json(_config(count))) for count in (1, 2))
    assert two[0] == two[1]
    assert (one[0].num_ranks, two[0].num_ranks) == (1, 2)
    assert min(one[0].seconds, two[0].seconds) > 0 and two[0].activations_gib is None


def test_the_table_sets_ranks_against_the_fewest() -> None:
    page = sequence_page(_config(2), [SequenceTimes(1, 3.0, 40.0), SequenceTimes(2, 2.0, 22.0)], "here")
    assert [cell.strip() for cell in page.splitlines()[3].split("|")[1:-1]] == ["2", "2.000", "1.50", "22.00", "0.550"]
    # 3 latents of 8 x 8, patches of 2 x 2
    assert num_sequence_tokens(_config(2)) == 48 and page.splitlines()[-1].startswith("48 visual and ")
