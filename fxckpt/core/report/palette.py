"""Colours of the pictures: told apart by the colour-blind, readable on light and on dark pages.

Hues are those of Okabe and Ito, "Color Universal Design" (2008), https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

from fxckpt.core.simulate import PeakKind

TEXT = "#767b82"
"""Contrast above 4:1 on white and on near-black."""

GREY, BLUE, ORANGE, SKY, GREEN = "#999999", "#0072b2", "#e69f00", "#56b4e9", "#009e73"
PURPLE, VERMILION = "#cc79a7", "#d55e00"

KIND_COLOURS: dict[PeakKind, str] = {
    "reserved": "#c8c8c8",
    "libraries": "#b3b3a0",
    "parameters and buffers": GREY,
    "inputs and outputs": PURPLE,
    "gradients": GREEN,
    "saved": BLUE,
    "recomputed": ORANGE,
    "temporaries": SKY,
}
"""What each kind of memory is drawn in, in the order in which kinds are stacked: what stays lowest."""

SERIES = ((PURPLE, "s"), (GREEN, "^"), (SKY, "D"), (VERMILION, "v"), (GREY, "P"), (ORANGE, "X"), (BLUE, "*"))
"""Colours and marks of series of points: no two alike in both."""
