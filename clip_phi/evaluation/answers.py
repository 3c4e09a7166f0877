"""Answers as they come, in a file: what a killed evaluation has got is not asked again, and what it got from another
checkpoint, other data or another prompt is never used."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..batching.images import load_image
from ..data.sample import File, user_message
from .generate import Answer, Prompt, generate_answers


class Request(NamedTuple):
    """One prompt. image: None for none. text: the instruction; None for the caption of a bare image. transcript: what
    is said before it. key: of all."""

    key: str
    image: File | bytes | None
    text: str | None
    transcript: str | None = None


class AnswerFile:
    """One jsonl file for each process in a folder; the first line of each says what its answers are bound to.

    binding: for json, all that decides an answer. Files bound to anything else are deleted, by the main process."""

    def __init__(
        self, folder: Path, binding: dict[str, Any], rank: int, wait: Callable[[], Any], say: Callable[..., Any]
    ):
        self.known: dict[str, Answer] = {}
        stale = 0
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("rank-*.jsonl")):
                if _binding_of(path) != binding:
                    path.unlink()
                    stale += 1
        if stale:
            say(f"answers in {folder} are of another checkpoint, data, prompt or decoding, and are not used")
        wait()  # before the others read, and before anyone writes
        for path in sorted(folder.glob("rank-*.jsonl")):
            self.known |= _read(path)
        wait()
        self.path = folder / f"rank-{rank}.jsonl"
        if self.path.exists():
            _cut_torn_line(self.path)
        else:
            self.path.write_text(json.dumps(binding) + "\n", encoding="utf-8")

    def add(self, keys: Sequence[str], answers: Sequence[Answer]) -> None:
        self.known |= dict(zip(keys, answers, strict=True))
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps([key, *answer]) + "\n" for key, answer in zip(keys, answers, strict=True))


def _binding_of(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            return json.loads(file.readline())
        except ValueError:
            return None


def _read(path: Path) -> dict[str, Answer]:
    """Without the last line, if the process was killed in it."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        try:
            key, *answer = json.loads(line)
        except ValueError:
            continue
        found[key] = Answer(*answer)
    return found


def _cut_torn_line(path: Path) -> None:
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def answer_all(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    file: AnswerFile | None,
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[Any], Any] = lambda batches: batches,
) -> dict[str, Answer]:
    """This process' share of the answers, by key, and those that its file has already.

    file: None to keep nothing. progress: wraps the batches, for a bar."""
    known = file.known if file is not None else {}
    # Prompts of like length, with or without an image, share a batch: less padding.
    missing = sorted(
        (request for request in requests if request.key not in known),
        key=lambda request: (request.image is None, len(request.text or ""), request.key),
    )[rank::world_size]
    found = dict(known)
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    for batch in progress(batches):
        answers = generate_answers(model, processor, [as_prompt(each) for each in batch], max_new_tokens, num_beams)
        keys = [request.key for request in batch]
        found |= dict(zip(keys, answers, strict=True))
        if file is not None:
            file.add(keys, answers)
    return found


def as_prompt(request: Request) -> Prompt:
    image = load_image(request.image) if request.image is not None else None
    return [user_message(request.text, int(image is not None), request.transcript)], image
