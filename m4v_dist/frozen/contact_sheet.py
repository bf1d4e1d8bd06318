"""Many clips on one picture, some frames of each in a row with a text below; Pillow's second door, beside video_file.

A script that the font does not have is drawn as boxes, and long texts are cut: the whole of them stands in what the
caller writes beside the picture.

Legend: `t` frames, `h` `w` pixels, `c` red, green, blue.
"""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m4v_dist.frozen.video_file import Frames, encode_png

FRAMES_OF_A_CLIP = 6
THUMBNAIL_HEIGHT_PX = 180
_WIDTH_PX = 1400
_MARGIN_PX = 8
_LINE_PX = 18
_FONT_PX = 13
_CHARS_OF_A_LINE = 170
_MAX_LINES = 8


@dataclass(frozen=True)
class Strip:
    """One clip as it is shown.

    Args:
        thumbnails: some of its frames, t h w c uint8, small.
        lines: what is written below.
    """

    thumbnails: Frames
    lines: tuple[str, ...]


def make_strip(frames: Frames, lines: Sequence[str]) -> Strip:
    """Take some frames of a clip t h w c, evenly spaced with the first and the last, and shrink them."""
    from PIL import Image

    chosen = np.unique(np.linspace(0, len(frames) - 1, FRAMES_OF_A_CLIP).round().astype(int))
    height, width = frames.shape[1:3]
    widest = (_WIDTH_PX - (FRAMES_OF_A_CLIP + 1) * _MARGIN_PX) // FRAMES_OF_A_CLIP
    scale = min(THUMBNAIL_HEIGHT_PX / height, widest / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = [Image.fromarray(frames[index]).resize(size, Image.Resampling.LANCZOS) for index in chosen]
    return Strip(np.stack([np.asarray(picture, dtype=np.uint8) for picture in small]), _wrapped(lines))


def contact_sheet(strips: Iterable[Strip], font_file: str) -> bytes:
    """One PNG with the strips under each other, in a TrueType font."""
    from PIL import Image, ImageDraw, ImageFont

    shown = list(strips)
    heights = [strip.thumbnails.shape[1] + _LINE_PX * len(strip.lines) + 2 * _MARGIN_PX for strip in shown]
    sheet = Image.new("RGB", (_WIDTH_PX, sum(heights) + _MARGIN_PX), "white")
    draw = ImageDraw.Draw(sheet)
    font: Any = ImageFont.truetype(font_file, _FONT_PX)
    top = _MARGIN_PX
    for strip, height in zip(shown, heights, strict=True):
        left = _MARGIN_PX
        for picture in strip.thumbnails:
            sheet.paste(Image.fromarray(picture), (left, top))
            left += picture.shape[1] + _MARGIN_PX
        for number, line in enumerate(strip.lines):
            draw.text((_MARGIN_PX, top + strip.thumbnails.shape[1] + _LINE_PX * number + 2), line, "black", font)
        top += height
    return encode_png(np.asarray(sheet, dtype=np.uint8))


def _wrapped(lines: Sequence[str]) -> tuple[str, ...]:
    found = [part for line in lines for part in textwrap.wrap(line, _CHARS_OF_A_LINE) or [""]]
    return tuple(found if len(found) <= _MAX_LINES else [*found[: _MAX_LINES - 1], "..."])
