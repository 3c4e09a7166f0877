"""Sheets of images with a text under each, drawn by matplotlib."""

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

from PIL import Image


def draw_images(panel: Any, images: Sequence[Image.Image | None], texts: Sequence[str], columns: int = 4) -> None:
    """Draw images in a grid, each with its text below, whose lines are shortened and wrapped.

    panel: a matplotlib Figure or SubFigure. images: None leaves the place empty."""
    grid = panel.subplots(max(1, -(-len(images) // columns)), columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, text in zip(grid, images, texts, strict=False):
        if image is not None:
            axes.imshow(image)
        lines = [textwrap.fill(textwrap.shorten(line, 110), 34) for line in text.splitlines()]
        # a caption may hold two dollar signs, which matplotlib reads as mathematics
        axes.set_title("\n".join(lines), y=-0.02, va="top", fontsize=7, parse_math=False)


def save_png(figure: Any, path: Any, dpi: int = 100) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib draws a box where the font lacks a letter, and warns
        figure.savefig(path, dpi=dpi, format="png")
