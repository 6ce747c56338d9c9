"""A picture of a network's widths before and after pruning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw

from dfcompress.run import write_atomically

ROW, LEFT, WIDE = 14, 260, 640  # Pixels: a line of text, room for a layer's name, the longest bar.
BEFORE, AFTER = (214, 214, 214), (58, 110, 165)


def draw_widths(path: Path, widths: Mapping[str, tuple[int, int]]) -> None:
    """Write the PNG `path` with one bar for each layer of `widths` (channels before, channels after): the channels
    before in grey, the remaining channels in blue, and both numbers.
    """
    picture = Image.new("RGB", (LEFT + WIDE + 90, ROW * (len(widths) + 1)), "white")
    draw = ImageDraw.Draw(picture)
    most = max((before for before, _ in widths.values()), default=1)
    for number, (name, (before, after)) in enumerate(widths.items()):
        top = ROW // 2 + ROW * number
        draw.text((4, top), name[-40:], fill="black")
        for channels, colour in ((before, BEFORE), (after, AFTER)):
            draw.rectangle((LEFT, top + 2, LEFT + max(1, WIDE * channels // most), top + ROW - 3), fill=colour)
        draw.text((LEFT + WIDE + 8, top), f"{before} > {after}" if after < before else f"{before}", fill="black")
    with write_atomically(path) as temporary:
        picture.save(temporary, format="PNG")
