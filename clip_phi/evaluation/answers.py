"""Answers saved as they are generated. A killed evaluation continues with them; answers of another model, other data or
another prompt are never used."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..batching.images import load_image
from ..data.files import checked_line, read_checked_lines
from ..data.sample import Images, images_of, user_message
from .generate import GeneratedAnswer, Prompt, answer_logprobs, generate_answers


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: greedily or by beam search, never sampled."""

    prompt: str | None = None  # the question replaces "{question}" in it; None for the usual prompt
    max_new_tokens: int = 64
    num_beams: int = 1  # 1 is greedy
    batch_size: int = 32
    seed: int = 0  # of the shuffles and the bootstrap
    shuffles: int = 1  # the shuffled control is the mean of so many

    def about(self) -> dict[str, Any]:
        """For a result."""
        return {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens, "sampled": False}


@dataclass(frozen=True)
class Processes:
    """The processes that share the work; by default this one alone."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda values: values  # joins the lists of all, in each of them
    wait: Callable[[], Any] = lambda: None  # returns when all have called it
    log: Callable[..., Any] = print  # prints a line
    progress: Callable[[Any], Any] = lambda batches: batches  # wraps batches or samples, for a progress bar


ALONE = Processes()


class Question(NamedTuple):
    """One prompt. key: a hash of the others. text: the instruction; None for the caption of a bare image."""

    key: str
    image: Images | None
    text: str | None
    transcript: str | None = None


def answer_all(
    model: Any, processor: Any, questions: list[Question], decoding: Decoding, processes: Processes, folder: Path |
    None, binding: dict[str, Any],
) -> dict[str, GeneratedAnswer]:  # fmt: skip
    """The answers by key. All processes call it, and get all.

    folder: of the answers that are saved; None to save none. binding: for json, all that the answers depend on."""
    found, path = dict[str, GeneratedAnswer](), None
    if folder is not None:
        path = folder / f"rank-{processes.rank}.jsonl"
        found = _saved_answers(folder, path, binding, processes)
        if saved := sum(question.key in found for question in questions):
            processes.log(f"{saved:,} of {len(questions):,} answers are there already")
    # Prompts of similar length, with or without an image, share a batch: less padding.
    missing = [question for question in questions if question.key not in found]
    missing.sort(key=lambda question: (question.image is None, len(question.text or ""), question.key))
    mine, size = missing[processes.rank :: processes.world_size], decoding.batch_size
    for batch in processes.progress([mine[start : start + size] for start in range(0, len(mine), size)]):
        prompts = [prompt_for(each) for each in batch]
        answers = generate_answers(model, processor, prompts, decoding.max_new_tokens, decoding.num_beams)
        new = dict(zip((question.key for question in batch), answers, strict=True))
        found |= new
        if path is not None:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(checked_line([key, *answer]) for key, answer in new.items())
    return dict(processes.gather([*found.items()]))


def _saved_answers(folder: Path, path: Path, binding: dict, processes: Processes) -> dict[str, GeneratedAnswer]:
    """Those in the folder, which has a file of checked_line() for each process; path: of this one, ready to append to.

    The first line of a file is its binding. The main process deletes files with another one."""
    folder.mkdir(parents=True, exist_ok=True)
    if processes.rank == 0:
        stale = [each for each in folder.glob("rank-*.jsonl") if read_checked_lines(each)[:1] != [binding]]
        for each in stale:
            each.unlink()
        if stale:
            about = "are of another model, data, prompt or decoding, and are not used"
            processes.log(f"saved answers in {folder} {about}")
    processes.wait()  # before the others read, and before any process writes
    lines = [line for each in sorted(folder.glob("rank-*.jsonl")) for line in read_checked_lines(each)[1:]]
    processes.wait()
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    else:
        path.write_text(checked_line(binding), encoding="utf-8")
    return {key: GeneratedAnswer(*answer) for key, *answer in lines}


def answer_likelihoods(
    model: Any, processor: Any, pairs: list[tuple[Question, str]], decoding: Decoding, processes: Processes
) -> np.ndarray:
    """The probability of each answer, float64 (pairs,); see answer_logprobs. All processes call it, and get all."""
    found, mine, size = list[Any](), range(processes.rank, len(pairs), processes.world_size), decoding.batch_size
    for batch in processes.progress([mine[start : start + size] for start in range(0, len(mine), size)]):
        prompts, texts = [prompt_for(pairs[number][0]) for number in batch], [pairs[number][1] for number in batch]
        for token in (processor.image_token, processor.tokenizer.pad_token, processor.tokenizer.eos_token):
            texts = [text.replace(token, f"{token[0]} {token[1:]}") for text in texts]  # spelled out: no text has it
        found += zip(batch, answer_logprobs(model, processor, prompts, texts), strict=True)
    return np.exp([logprob for _, logprob in sorted(processes.gather(found))])


def prompt_for(question: Question) -> Prompt:
    images = [load_image(each) for each in images_of(question.image)]
    return [user_message(question.text, len(images), question.transcript)], images
