"""What a decoder child does: one message in, one answer out, until its pipe closes. No torch, so that it starts fast.

A request names a verb of `VERBS`, which says all that a child can do; each takes the media bytes and the request's
settings, and gives a reply (JSON) with a payload (bytes). `decoder_pool.py` is the parent's side.
"""

import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from typing import IO, Any

from data_pipeline.decode import DecodeError, DecodeRule, decode_clip
from data_pipeline.survey import SurveyRule, survey_clip
from m4v_dist.errors import ConfigError

Answer = tuple[dict[str, Any], bytes]
Verb = Callable[[bytes, dict[str, Any]], Answer]
_REPLY_GRACE_S = 5.0


def decode_answer(data: bytes, settings: dict[str, Any]) -> Answer:
    """A clip: its facts, and its frames as bytes.

    Args:
        data: the media file.
        settings: `kind`, `rule` (`DecodeRule` as a dict) and `span`, as `decode_clip` takes them.
    """
    values = settings["rule"]
    rule = DecodeRule(**{**values, "buckets": tuple(tuple(size) for size in values["buckets"])})
    span = settings["span"]
    clip = decode_clip(data, settings["kind"], rule, None if span is None else (span[0], span[1]))
    facts = {
        "shape": clip.frames.shape,
        "fps": clip.fps,
        "bucket": clip.bucket,
        "source_size": clip.source_size,
        "source_num_frames": clip.source_num_frames,
        "source_fps": clip.source_fps,
        "decoder": clip.decoder,
    }
    return facts, clip.frames.tobytes()


def survey_answer(data: bytes, settings: dict[str, Any]) -> Answer:
    """What a raw clip holds, as JSON: `survey.Survey`.

    Args:
        data: the media file.
        settings: `kind`, and `rule` (`SurveyRule` as a dict).
    """
    return survey_clip(data, settings["kind"], SurveyRule(**settings["rule"])).to_json(), b""


VERBS: dict[str, Verb] = {"decode": decode_answer, "survey": survey_answer}
"""All that a child can be asked for; a `DecodeError` or `ConfigError` that a verb raises reaches the caller as such."""


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer requests until the pipe closes."""
    while True:
        try:
            header, data = receive(requests)
        except EOFError:
            return
        # the kernel ends a hung decoder even when the parent is gone: SIGALRM's default action needs no Python
        signal.setitimer(signal.ITIMER_REAL, header["timeout_s"] + _REPLY_GRACE_S)
        reply: dict[str, Any]
        try:
            reply, payload = VERBS[header["verb"]](data, header["settings"])
        except DecodeError as error:
            reply, payload = {"error": str(error)}, b""
        except ConfigError as error:
            reply, payload = {"broken_install": str(error)}, b""
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(replies, reply, payload)


def send(pipe: IO[bytes], header: dict[str, Any], payload: bytes) -> None:
    """Write one message: two lengths, JSON, bytes."""
    text = json.dumps(header).encode()
    pipe.write(struct.pack(">QQ", len(text), len(payload)) + text)
    pipe.write(payload)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Answer:
    """Read one message.

    Raises:
        EOFError: the pipe closed before its end.
    """
    text_size, payload_size = struct.unpack(">QQ", _read_exactly(pipe, 16))
    return json.loads(_read_exactly(pipe, text_size)), _read_exactly(pipe, payload_size)


def _read_exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) != size:
        raise EOFError(f"pipe closed after {len(data)} of {size} bytes")
    return data


def _child_main() -> None:
    # decoders print to stdout too: the replies get a private descriptor, and theirs goes where stderr goes
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    _child_main()
