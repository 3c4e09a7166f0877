"""Sample: one image and what is said about it. The shape that every source gives and that both stages train on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Turn:
    """One utterance. transcript: what was said aloud before the text of a user's turn, or None."""

    role: Literal["user", "assistant"]
    text: str
    transcript: str | None = None


Branch = tuple[Turn, ...]


@dataclass(frozen=True)
class Sample:
    """An image (None for a text-only record) and its branches: independent conversations about it.

    Stage 1: five branches of one assistant's turn each, the captions. Stage 2: one or more conversations.
    origin: "file:record", for every message about this sample."""

    image: Path | None
    branches: tuple[Branch, ...]
    origin: str


def as_messages(branch: Branch, has_image: bool) -> list[dict[str, Any]]:
    """A branch in the chat format of transformers, its image (as a placeholder) before everything else."""
    messages: list[dict[str, Any]] = []
    for turn in branch:
        content = [{"type": "text", "text": turn.text}]
        if turn.transcript is not None:
            content.insert(0, {"type": "transcript", "text": turn.transcript})
        messages.append({"role": turn.role, "content": content})
    if has_image:
        image = {"type": "image"}
        if messages and messages[0]["role"] == "user":
            messages[0]["content"].insert(0, image)
        else:
            messages.insert(0, {"role": "user", "content": [image]})
    return messages
