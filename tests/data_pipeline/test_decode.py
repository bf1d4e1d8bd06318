"""Decoding: the frame rule, buckets, and files that are damaged, hang or kill the decoder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.decode import (
    DecodedClip,
    DecodeError,
    DecoderPool,
    DecodeRule,
    choose_bucket,
    choose_frames,
    decode_clip,
    require_decord,
)
from m4v_dist.errors import ConfigError
from m4v_dist.frozen.video_file import encode_mp4, encode_png, read_video
from tests.data_pipeline.made_cache import moving_blocks

RULE = DecodeRule(buckets=((64, 64), (48, 96)), num_frames=17, fps=24.0)


@pytest.mark.parametrize(
    ("num_frames", "source_fps", "limit", "fps", "expected"),
    [
        (1, 24.0, 57, 24.0, [0]),
        (8, 24.0, 57, 24.0, [0]),
        (9, 24.0, 57, 24.0, list(range(9))),
        (100, 24.0, 17, 24.0, list(range(17))),
        (40, 48.0, 57, 24.0, list(range(0, 34, 2))),
        (30, 15.0, 57, 24.0, list(range(25))),
        (20, 36.0, 57, 24.0, [0, 2, 3, 5, 6, 8, 9, 11, 12]),
    ],
)
def test_frames_are_8k_plus_1_from_the_start_at_the_rate(
    num_frames: int, source_fps: float, limit: int, fps: float, expected: list[int]
) -> None:
    indices, rate = choose_frames(num_frames, source_fps, DecodeRule(((64, 64),), limit, fps))
    assert indices.tolist() == expected
    assert rate == min(source_fps, fps)


def test_a_clip_goes_to_the_nearest_aspect_ratio() -> None:
    assert choose_bucket((720, 1280), ((64, 64), (48, 96))) == (48, 96)
    assert choose_bucket((300, 350), ((64, 64), (48, 96))) == (64, 64)


def test_a_video_covers_its_bucket_and_keeps_its_centre() -> None:
    frames = moving_blocks(1, 20, 96, 128)
    clip = decode_clip(encode_mp4(frames, 24.0), "mp4", RULE)
    assert clip.frames.shape == (17, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert (clip.fps, clip.bucket, clip.source_size, clip.source_num_frames) == (24.0, (64, 64), (96, 128), 20)
    # the centre square is 96 of 128 columns; block averages at the same places, H.264 and resize aside
    expected = frames[:17, :, 16:112].reshape(17, 8, 12, 8, 12, 3).mean((2, 4))
    found = clip.frames.reshape(17, 8, 8, 8, 8, 3).mean((2, 4))
    assert np.abs(found - expected).mean() < 4


def test_a_still_is_one_frame_and_a_small_one_is_enlarged() -> None:
    clip = decode_clip(encode_png(moving_blocks(2, 1, 32, 32)[0]), "png", RULE)
    assert clip.frames.shape == (1, 64, 64, 3) and clip.fps == 0.0 and clip.source_size == (32, 32)


def bad_files() -> dict[str, bytes]:
    sound = encode_mp4(moving_blocks(3, 30), 24.0)
    noise = np.random.default_rng(0).integers(0, 256, 20000).astype(np.uint8).tobytes()
    holed = bytearray(sound)
    holed[len(sound) // 2 : len(sound) // 2 + 2000] = bytes(2000)
    return {
        "empty": b"",
        "random": noise,
        "html": b"<html><body>404 not found</body></html>",
        "half": sound[: len(sound) // 2],
        "head only": sound[:500],
        "no frames": sound[:32],
        "transport stream": (b"G" + bytes(187)) * 20,
    }


@pytest.mark.parametrize("name", ["empty", "random", "html", "half", "head only", "no frames", "transport stream"])
def test_a_bad_file_gives_a_printable_error(name: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_clip(bad_files()[name], "mp4", RULE)
    message = str(caught.value)
    assert message.isascii() and message.isprintable() and 5 < len(message) < 400
    assert "/github/" not in message


def test_an_error_message_is_the_same_on_each_run() -> None:
    messages = []
    for _ in range(2):
        with pytest.raises(DecodeError) as caught:
            decode_clip(bad_files()["half"], "mp4", RULE)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and not any(part.count(":") == 2 for part in messages[0].split())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(DecodeError, match="kind 'wmv'"):
        decode_clip(b"x", "wmv", RULE)


def test_the_pool_keeps_the_order_and_the_neighbours_of_a_bad_clip() -> None:
    sound = [encode_mp4(moving_blocks(seed, 9 + 8 * (seed % 2)), 24.0) for seed in range(4)]
    clips = [(sound[0], "mp4"), (b"junk", "mp4"), (sound[1], "mp4"), (sound[2], "mp4"), (b"", "png"), (sound[3], "mp4")]
    with DecoderPool(2, 30.0, RULE) as pool:
        results = list(pool.decode_all(clips))
    assert [isinstance(result, DecodeError) for result in results] == [False, True, False, False, True, False]
    lengths = [len(result.frames) for result in results if isinstance(result, DecodedClip)]
    assert lengths == [9, 17, 9, 17]
    assert isinstance(results[0], DecodedClip)
    assert np.array_equal(results[0].frames, decode_clip(sound[0], "mp4", RULE).frames)


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()] + [
        int(pid)
        for task in Path(f"/proc/{os.getpid()}/task").iterdir()
        if task.name != str(os.getpid())
        for pid in (task / "children").read_text().split()
    ]


def decoders() -> list[int]:
    return [pid for pid in children() if b"data_pipeline.decode" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_killed_child_costs_its_clip_only() -> None:
    sound = encode_mp4(moving_blocks(5, 9), 24.0)
    with DecoderPool(1, 30.0, RULE) as pool:
        assert len(pool.decode(sound, "mp4").frames) == 9
        (child,) = decoders()
        os.kill(child, signal.SIGSTOP)  # a request is pending when it dies
        os.kill(child, signal.SIGSEGV)
        os.kill(child, signal.SIGCONT)
        with pytest.raises(DecodeError, match="SIGSEGV"):
            pool.decode(sound, "mp4")
        assert len(pool.decode(sound, "mp4").frames) == 9
        assert decoders() != [child]
    assert decoders() == []


def test_a_child_that_hangs_is_killed_after_the_timeout() -> None:
    sound = encode_mp4(moving_blocks(5, 9), 24.0)
    with DecoderPool(1, 3.0, RULE) as pool:
        assert len(pool.decode(sound, "mp4").frames) == 9
        os.kill(decoders()[0], signal.SIGSTOP)
        with pytest.raises(DecodeError, match="timeout_s=3"):
            pool.decode(sound, "mp4")
        assert len(pool.decode(sound, "mp4").frames) == 9


def fake_decord(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put another decord before the installed one, for processes that start now."""
    (folder / "decord.py").write_text(f"import os, sys, time\nDECORDError = OSError\n{code}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_a_child_that_dies_of_a_python_error_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decord(tmp_path, monkeypatch, "def VideoReader(file, **_):\n    raise KeyError('surprise')")
    with DecoderPool(1, 30.0, RULE) as pool:
        for _ in range(3):
            with pytest.raises(DecodeError, match=r"^decoder died: exit code 1: .*decode.py.*KeyError: 'surprise'$"):
                pool.decode(b"x" * 100, "mp4")


def test_what_a_dying_child_printed_is_kept_to_its_end_and_to_its_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """def VideoReader(file, **_):
    kind = file.read(1)
    if kind == b"1":
        print("of the first clip", file=sys.stderr)
        raise ValueError("a bad file")
    for line in range(20000):
        os.write(kind[0] % 2 + 1, b"[h264 @ 0x55aa00%04x] line %d\\n" % (os.getpid() % 65536, line))
    os.write(2, b"[h264 @ 0x55aa00ff00] out of \\xff words\\n")
    os._exit(3)
"""
    fake_decord(tmp_path, monkeypatch, code)
    messages = []
    # 2 prints to stdout, 3 to stderr
    for clip in (b"2", b"3"):
        with DecoderPool(1, 30.0, RULE) as pool:
            with pytest.raises(DecodeError, match="^decord: a bad file$"):
                pool.decode(b"1", "mp4")
            with pytest.raises(DecodeError, match=r"^decoder died: exit code 3: ") as caught:
                pool.decode(clip, "mp4")
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and len(messages[0]) < 600 and messages[0].isascii()
    assert messages[0].endswith("] line 19999 [h264] out of ? words") and "first clip" not in messages[0]


def test_what_a_sound_clip_printed_is_not_laid_at_the_next_ones_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """def VideoReader(file, **_):
    if file.read(1) == b"1":
        print("of the first clip", file=sys.stderr)
        raise ValueError("a bad file")
    os._exit(4)
"""
    fake_decord(tmp_path, monkeypatch, code)
    with DecoderPool(1, 30.0, RULE) as pool:
        with pytest.raises(DecodeError, match="a bad file"):
            pool.decode(b"1", "mp4")
        with pytest.raises(DecodeError, match="^decoder died: exit code 4$"):
            pool.decode(b"2", "mp4")


def test_a_child_that_closes_its_pipe_and_lives_on_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.decode._EXIT_GRACE_S", 0.3)
    fake_decord(tmp_path, monkeypatch, "def VideoReader(file, **_):\n    os.closerange(3, 99)\n    time.sleep(60)")
    with DecoderPool(1, 30.0, RULE) as pool:
        with pytest.raises(DecodeError, match=r"^decoder died: it closed its pipe, ran on for 0.3 s, and was killed$"):
            pool.decode(b"x" * 100, "mp4")
        assert decoders() == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('no libdecord here')", "ImportError: no libdecord here"),
        ("raise OSError('libavcodec.so.58: cannot open')", "OSError: libavcodec.so.58: cannot open"),
        ("raise RuntimeError('Cannot find the files')", "RuntimeError: Cannot find the files"),
    ],
)
def test_a_broken_decord_is_no_fault_of_the_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    fake_decord(tmp_path, monkeypatch, code)
    with (
        DecoderPool(1, 30.0, RULE) as pool,
        pytest.raises(ConfigError, match=f"decord cannot be imported.*{reason}.*nstall"),
    ):
        pool.decode(b"x" * 100, "mp4")
    with pytest.raises(ConfigError, match=f"decord cannot be imported.*exit code 1.*{reason}.*nstall"):
        require_decord()


def test_a_decord_that_crashes_does_not_take_the_job_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decord(tmp_path, monkeypatch, "os.kill(os.getpid(), 11)")
    with pytest.raises(ConfigError, match="SIGSEGV"):
        require_decord()


def test_an_installed_decord_is_let_pass() -> None:
    require_decord()


def test_a_decoder_child_starts_without_torch() -> None:
    code = "import sys, data_pipeline.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_mp4(moving_blocks(7, 11), 29.97))
    frames, fps = read_video(str(path))
    assert frames.shape == (11, 96, 128, 3) and fps == pytest.approx(29.97, abs=0.01)
