"""HTML pages, the model card and tables of text as jinja2 templates. All pages share the style of page.html."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image


def data_uri(image: Image.Image) -> str:
    """The image as a JPEG inside a URL, so that a page needs no other file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters["data_uri"] = data_uri


def render(template: str, **values: Any) -> Iterator[str]:
    """The filled template of this folder, piece by piece. Values are escaped in an .html file only.

    An iterator among the values is read while the text is produced, so a long page of images needs little memory."""
    return ENVIRONMENT.get_template(template).generate(**values)
