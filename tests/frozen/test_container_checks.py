"""What a container says of its own length and bytes, for each kind, whole, cut everywhere, and harmed."""

import numpy as np
import pytest

from m4v_dist.frozen.container_checks import require_whole
from m4v_dist.frozen.video_file import MediaError, encode_mp4
from tests.data_pipeline.made_media import Made, make_video, pictures

FRAMES = pictures(9)
KINDS = [
    Made("mp4", "libx264"), Made("mov", "prores_ks", "yuv422p10le"), Made("matroska", "libx264"),
    Made("webm", "libvpx-vp9"), Made("asf", "wmv2"), Made("mpeg", "mpeg1video"), Made("mpeg", "mpeg2video"),
    Made("mpegts", "libx264"), Made("avi", "mpeg4"), Made("flv", "flv"),
]  # fmt: skip


@pytest.mark.parametrize("made", KINDS, ids=lambda made: f"{made.container}-{made.codec}")
def test_whole_files_pass(made: Made) -> None:
    require_whole(make_video(made, FRAMES))
    require_whole(encode_mp4(FRAMES, 24.0) + b"some program's own tail")


@pytest.mark.parametrize("made", KINDS[:8], ids=lambda made: f"{made.container}-{made.codec}")
def test_a_cut_is_seen_nearly_everywhere(made: Made) -> None:
    """Not where a transport stream ends with a packet, nor a program stream with a unit."""
    media = make_video(made, FRAMES)
    places = np.random.default_rng(0).integers(600, len(media) - 1, 100)
    seen = 0
    for place in places:
        try:
            require_whole(media[:place])
        except MediaError as error:
            assert "the file is cut" in str(error)
            seen += 1
    assert seen >= (95 if made.container.startswith("mpeg") else 100)


def test_a_live_webm_that_states_no_size_passes() -> None:
    media = bytearray(make_video(Made("webm", "libvpx-vp9"), FRAMES))
    segment = media.index(bytes.fromhex("18538067")) + 4
    media[segment : segment + 8] = bytes.fromhex("01ffffffffffffff")
    require_whole(bytes(media))


def test_every_bit_of_a_matroska_cluster_counts() -> None:
    media = make_video(Made("matroska", "libx264"), FRAMES)
    cluster = media.index(bytes.fromhex("1f43b675"))
    for place in range(cluster + 20, len(media) - 100, 97):
        harmed = media[:place] + bytes([media[place] ^ 4]) + media[place + 1 :]
        with pytest.raises(MediaError, match="checksum is wrong|cut"):
            require_whole(harmed)


def test_random_bytes_behind_a_known_start_never_crash() -> None:
    draw = np.random.default_rng(1)
    for start in (b"\x00\x00\x00\x20ftyp", b"\x1a\x45\xdf\xa3", bytes.fromhex("3026b2758e66cf11"), b"OggS",
                  b"\x00\x00\x01\xba", b"G" + bytes(187)):  # fmt: skip
        for length in (0, 1, 7, 30, 500):
            try:
                require_whole(start + draw.bytes(length))
            except MediaError as error:
                assert "cut" in str(error) or "checksum" in str(error)
