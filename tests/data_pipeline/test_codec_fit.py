"""The codec's fit reads listed clips, states what it measured, and is the verb that writes its file."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.codec_fit import measure
from jobs.fit_codec import main
from m4v_dist import tensor_files
from m4v_dist.frozen.pca_codec import PcaCodec


@pytest.fixture
def clip_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of two animations inside an importable package."""
    from PIL import Image

    package = tmp_path / "clips_for_fit"
    package.mkdir()
    (package / "__init__.py").write_text("")
    clips = []
    for number, split in enumerate(("train", "held_out")):
        blocks = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        pictures = [Image.fromarray(np.roll(blocks, t, axis=1)) for t in range(10)]
        buffer = io.BytesIO()
        pictures[0].save(buffer, format="WEBP", save_all=True, append_images=pictures[1:], duration=50, lossless=True)
        (package / f"{split}.webp").write_bytes(buffer.getvalue())
        clips.append({"stem": split, "package": "pytest", "file": f"clips_for_fit/{split}.webp", "split": split})
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"clips": clips}))
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


def test_a_fit_states_the_psnr_that_its_held_out_clips_give(clip_list: Path, tmp_path: Path) -> None:
    out = tmp_path / "codec.safetensors"
    assert main(["--clips", str(clip_list), "--out", str(out), "--channels", "6"]) == 0
    provenance = json.loads(tensor_files.read_tensor_metadata(str(out))["provenance"])
    assert provenance["training_clips"] == ["train"] and provenance["held_out_clips"] == ["held_out"]
    held_out = json.loads(clip_list.read_text())["clips"][1:]
    figures = measure(PcaCodec.from_bytes(out.read_bytes()), held_out, 64)
    assert figures == pytest.approx(provenance["held_out_psnr"]["64px"], abs=0.01)
    assert 10 < figures["later_frames_db"] < figures["first_frames_db"] < 60


def test_a_list_without_held_out_clips_is_exit_3(
    clip_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = json.loads(clip_list.read_text())["clips"]
    clip_list.write_text(json.dumps({"clips": clips[:1]}))
    assert main(["--clips", str(clip_list), "--out", str(tmp_path / "out")]) == 3
    assert "1 training and 0 held-out clips" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_fitted_and_written_and_writes_nothing(
    clip_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "new" / "codec.safetensors"
    assert main(["--clips", str(clip_list), "--out", str(out), "--channels", "6", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would fit 6 channels on 1 clips at (64, 128, 256) px and measure on 1 held-out clips" in shown
    assert shown.endswith(f"and write {out}\n")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_clip_that_is_missing_is_exit_3_before_anything_is_fitted(
    clip_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    (tmp_path / "clips_for_fit" / "held_out.webp").unlink()
    out = tmp_path / "new" / "out"
    assert main(["--clips", str(clip_list), "--out", str(out), *options]) == 3
    assert "clips_for_fit/held_out.webp: the installed clips_for_fit has no such file" in capsys.readouterr().err
    assert not out.parent.exists()


def test_a_list_that_is_missing_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--clips", str(tmp_path / "no.json"), "--dry-run"]) == 3
    assert "no.json does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("channels", ["0", "193"])
def test_channels_that_a_block_cannot_give_are_exit_2(
    clip_list: Path, capsys: pytest.CaptureFixture[str], channels: str
) -> None:
    assert main(["--clips", str(clip_list), "--channels", channels, "--dry-run"]) == 2
    assert "1 to 192" in capsys.readouterr().err


def test_an_out_that_cannot_be_written_is_exit_2_before_the_fit(
    clip_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--clips", str(clip_list), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "by --out=..." in capsys.readouterr().err


class _OffBy:
    """A codec whose first frame is off by 5 of 255 and whose later ones by 10, towards grey so that nothing clips."""

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        return frames

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        step = torch.full((len(latents), 1, 1, 1), 10 / 127.5)
        step[0] = 5 / 127.5
        return latents - latents.sign() * step


def test_first_and_later_frames_are_measured_apart_and_in_place(clip_list: Path) -> None:
    clips = json.loads(clip_list.read_text())["clips"]
    expected = {"first_frames_db": 20 * math.log10(255 / 5), "later_frames_db": 20 * math.log10(255 / 10)}
    assert measure(_OffBy(), clips, 128) == pytest.approx(expected, abs=0.01)
