"""What the readers share: json files and image folders, with errors that name them."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError or ValueError (not json) with the file's name."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not json: {error}") from error


def image_path(folder: Path, name: Any, origin: str) -> Path:
    """Raises FileNotFoundError if there is no such image in the folder."""
    path = folder / str(name)
    if not path.is_file():
        raise FileNotFoundError(f"{origin}: no image {path}")
    return path
