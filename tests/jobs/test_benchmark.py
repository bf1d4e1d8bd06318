"""`jobs.benchmark`: the subject comes first, the rest is every verb's command line."""

import re
from pathlib import Path

import pytest

from jobs import benchmark

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "jobs" / "configs" / "demo.toml")
LARGE = str(ROOT / "jobs" / "configs" / "curriculum_768p.toml")


def test_flops_prints_the_tables_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(["flops", "--config", DEMO]) == 0
    out = capfd.readouterr().out
    titles = re.findall(r"^## (.+)$", out, flags=re.MULTILINE)
    assert [title.split(" (")[0] for title in titles] == [
        "The paper's figures and ours", "One forward by part", "Training", "One generated clip", "Parameters by part",
    ]  # fmt: skip
    assert "57.83 (+4.3 %)" in out and "1,972,059,200" in out
    assert out.splitlines()[-1].startswith("benchmark flops: ")
    assert not list(tmp_path.iterdir())


def test_flops_needs_no_folder_that_can_be_written(capfd: pytest.CaptureFixture[str]) -> None:
    """The run's folder may be another machine's."""
    assert benchmark.main(["flops", "--config", LARGE, "run.folder=/proc/none"]) == 0
    out = capfd.readouterr().out
    for line in ("| video_57f ", "| video_241f ", "| full_mamba_temporal ", "| unified: ssm scan "):
        assert line in out


def test_a_dry_run_prints_no_table(capfd: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["flops", "--config", DEMO, "--dry-run"]) == 0
    assert "|" not in capfd.readouterr().out


def test_an_override_changes_the_figures(capfd: pytest.CaptureFixture[str]) -> None:
    def clip(*overrides: str) -> str:
        assert benchmark.main(["flops", "--config", DEMO, *overrides]) == 0
        found = re.search(r"^\| this config .*$", capfd.readouterr().out, flags=re.MULTILINE)
        assert found
        return found[0]

    assert clip() != clip("model.num_single_blocks=4")
    assert clip() != clip("sampling.later_unit_guidance=1.0")


@pytest.mark.parametrize("argv", [["flop", "--config", DEMO], ["--config", DEMO], [], ["--config", DEMO, "flops"]])
def test_an_unknown_or_missing_subject_is_exit_2_and_names_the_known(
    argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(argv)
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert all(subject in err for subject in benchmark.SUBJECTS)


def test_a_wrong_key_is_exit_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["flops", "--config", DEMO, "model.mixr=ssm"]) == 2
    assert "model.mixer" in capfd.readouterr().err
