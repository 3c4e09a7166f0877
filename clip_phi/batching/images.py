"""Image files to what a CLIP image processor takes."""

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


def load_image(source: str | Path | bytes) -> Image.Image:
    """Open an image as upright RGB. Raises ValueError with its name if it cannot be read."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no image {name}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a readable image: {error}") from error
