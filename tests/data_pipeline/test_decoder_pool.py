"""Decoder children: they hang, die and are broken without harm to their neighbours, and say why."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.decode import DecodedClip, DecodeError, DecodeRule, decode_clip
from data_pipeline.decoder_pool import DecoderPool, require_decord
from m4v_dist.errors import ConfigError
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.made_cache import moving_blocks

RULE = DecodeRule(buckets=((64, 64), (48, 96)), num_frames=17, fps=24.0)
BY_DECORD = replace(RULE, decoder="decord")


def test_the_pool_keeps_the_order_and_the_neighbours_of_a_bad_clip() -> None:
    sound = [encode_mp4(moving_blocks(seed, 9 + 8 * (seed % 2)), 24.0) for seed in range(4)]
    media = [sound[0], b"junk", sound[1], sound[2], b"", sound[3]]
    clips = [(data, "mp4" if data else "png", None) for data in media]
    with DecoderPool(2, 30.0, RULE) as pool:
        results = list(pool.decode_all(clips))
    assert [isinstance(result, DecodeError) for result in results] == [False, True, False, False, True, False]
    lengths = [len(result.frames) for result in results if isinstance(result, DecodedClip)]
    assert lengths == [9, 17, 9, 17]
    assert isinstance(results[0], DecodedClip)
    assert np.array_equal(results[0].frames, decode_clip(sound[0], "mp4", RULE).frames)


def children() -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        # a thread of an earlier test (a server's, say) may end while it is looked at
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def decoders() -> list[int]:
    found = []
    for pid in children():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"data_pipeline.decoder_child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


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
    head = "import os, sys, time, types\nDECORDError = OSError\n"
    logging = "logging = types.SimpleNamespace(INFO=32, set_level=lambda level: None)\n"
    (folder / "decord.py").write_text(f"{head}{logging}{code}\n")
    monkeypatch.syspath_prepend(str(folder))


def marked(mark: bytes) -> bytes:
    """A sound video with a byte behind its boxes, by which a fake decord knows it."""
    return encode_mp4(moving_blocks(5, 9), 24.0) + mark


def test_a_child_that_dies_of_a_python_error_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decord(tmp_path, monkeypatch, "def VideoReader(file, **_):\n    raise KeyError('surprise')")
    with DecoderPool(1, 30.0, RULE) as pool:
        for _ in range(3):
            with pytest.raises(DecodeError, match=r"^decoder died: exit code 1: .*decord.py.*KeyError: 'surprise'$"):
                pool.decode(marked(b""), "mp4")


def test_what_a_dying_child_printed_is_kept_to_its_end_and_to_its_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """def VideoReader(file, **_):
    kind = file.read()[-1:]
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
        with DecoderPool(1, 30.0, BY_DECORD) as pool:
            with pytest.raises(DecodeError, match="^decord: a bad file$"):
                pool.decode(marked(b"1"), "mp4")
            with pytest.raises(DecodeError, match=r"^decoder died: exit code 3: ") as caught:
                pool.decode(marked(clip), "mp4")
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and len(messages[0]) < 600 and messages[0].isascii()
    assert messages[0].endswith("] line 19999 [h264] out of ? words") and "first clip" not in messages[0]


def test_what_a_sound_clip_printed_is_not_laid_at_the_next_ones_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """def VideoReader(file, **_):
    if file.read()[-1:] == b"1":
        print("of the first clip", file=sys.stderr)
        raise ValueError("a bad file")
    os._exit(4)
"""
    fake_decord(tmp_path, monkeypatch, code)
    with DecoderPool(1, 30.0, BY_DECORD) as pool:
        with pytest.raises(DecodeError, match="a bad file"):
            pool.decode(marked(b"1"), "mp4")
        with pytest.raises(DecodeError, match="^decoder died: exit code 4$"):
            pool.decode(marked(b"2"), "mp4")


def test_a_child_that_closes_its_pipe_and_lives_on_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.decoder_pool._EXIT_GRACE_S", 0.3)
    fake_decord(tmp_path, monkeypatch, "def VideoReader(file, **_):\n    os.closerange(3, 99)\n    time.sleep(60)")
    with DecoderPool(1, 30.0, RULE) as pool:
        with pytest.raises(DecodeError, match=r"^decoder died: it closed its pipe, ran on for 0.3 s, and was killed$"):
            pool.decode(marked(b""), "mp4")
        assert decoders() == []


def test_a_file_that_hangs_or_crashes_its_decoder_costs_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """def VideoReader(file, **_):
    kind = file.read()[-1:]
    if kind == b"h":
        time.sleep(600)
    if kind == b"c":
        os.kill(os.getpid(), 11)
    raise ValueError("no decord here")
"""
    fake_decord(tmp_path, monkeypatch, code)
    clips = [(marked(mark), "mp4", None) for mark in (b"-", b"h", b"-", b"c", b"-")]
    with DecoderPool(2, 8.0, RULE) as pool:
        results = list(pool.decode_all(clips))
    # the sound ones are PyAV's, for this decord can do none
    assert [result.decoder for result in results if isinstance(result, DecodedClip)] == ["pyav"] * 3
    assert "timeout_s=8" in str(results[1]) and "SIGSEGV" in str(results[3])


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
        pool.decode(marked(b""), "mp4")
    with pytest.raises(ConfigError, match=f"decord cannot be imported.*exit code 1.*{reason}.*nstall"):
        require_decord()


def test_a_decord_that_crashes_does_not_take_the_job_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decord(tmp_path, monkeypatch, "os.kill(os.getpid(), 11)")
    with pytest.raises(ConfigError, match="SIGSEGV"):
        require_decord()


def test_an_installed_decord_is_let_pass() -> None:
    require_decord()


def test_a_decoder_child_starts_without_torch() -> None:
    code = "import sys, data_pipeline.decoder_child; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
