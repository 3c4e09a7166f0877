"""LLaVA-Instruct: a json list of {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}."""

from pathlib import Path

from ..samples import Branch, Sample, Turn
from .records import image_path, read_json

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}


def read_llava_instruct(annotations: Path, images: Path) -> list[Sample]:
    """One Sample for each image: the conversations about it are its branches. In the order of first appearance.

    The image comes first in the prompt, wherever <image> stands in the first question. A record without image is a
    Sample of its own. Raises FileNotFoundError for a missing json, folder or image, and ValueError for a record that
    is not of this form: turns that do not alternate, an empty answer, <image> missing, repeated or out of place."""
    records = read_json(annotations)
    if not isinstance(records, list):
        raise ValueError(f"{annotations} is not a LLaVA-Instruct file: it needs a list of records")
    groups: dict[str, list[Branch]] = {}
    origins: dict[str, str] = {}
    for index, record in enumerate(records):
        origin = f"{annotations}:{index}"
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise ValueError(f"{origin} needs a list 'conversations'")
        image = record.get("image")
        key = image if image is not None else origin
        groups.setdefault(key, []).append(_branch(record["conversations"], image is not None, origin))
        origins.setdefault(key, origin)
    return [
        Sample(None if key == origins[key] else image_path(images, key, origins[key]), tuple(branches), origins[key])
        for key, branches in groups.items()
    ]


def _branch(conversation: list[dict[str, str]], has_image: bool, origin: str) -> Branch:
    turns = []
    for index, message in enumerate(conversation):
        try:
            role, text = ROLES[message["from"]], message["value"].strip()
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{origin}: turn {index} needs 'from' (human or gpt) and a text 'value'") from None
        if role != ("user", "assistant")[index % 2]:
            raise ValueError(f"{origin}: turn {index} is from {message['from']!r}; human and gpt must alternate")
        wanted = 1 if has_image and index == 0 else 0
        if text.count(IMAGE_TOKEN) != wanted:
            raise ValueError(f"{origin}: turn {index} has {text.count(IMAGE_TOKEN)} {IMAGE_TOKEN}, not {wanted}")
        text = text.replace(IMAGE_TOKEN, "").strip()
        if not text:
            raise ValueError(f"{origin}: turn {index} is empty")
        turns.append(Turn(role, text))  # type: ignore[arg-type]
    if not turns or len(turns) % 2:
        raise ValueError(f"{origin}: a conversation needs a question and ends with an answer")
    return tuple(turns)
