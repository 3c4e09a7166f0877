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


@dataclass
class Processes:
    """The processes that share the work; by default this one alone."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda values: values  # joins the lists of all, in each of them
    wait: Callable[[], Any] = lambda: None  # returns when all have called it
    log: Callable[..., Any] = print  # prints a line
    progress: Callable[[Any], Any] = lambda batches: batches  # wraps batches or samples, for a progress bar


class Question(NamedTuple):
    """One prompt. key: a hash of the others. text: the instruction; None for the caption of a bare image."""

    key: str
    image: Images | None
    text: str | None
    transcript: str | None = None


class AnswerFile:
    """One file of checked_line() for each process in a folder. The first line of each is the binding of its answers:
    for json, all that they depend on. The main process deletes files with another binding."""

    def __init__(self, folder: Path, binding: dict[str, Any], processes: Processes):
        folder.mkdir(parents=True, exist_ok=True)
        if processes.rank == 0:
            stale = [path for path in folder.glob("rank-*.jsonl") if read_checked_lines(path)[:1] != [binding]]
            for path in stale:
                path.unlink()
            if stale:
                about = "are of another model, data, prompt or decoding, and are not used"
                processes.log(f"saved answers in {folder} {about}")
        processes.wait()  # before the others read, and before any process writes
        lines = [line for path in sorted(folder.glob("rank-*.jsonl")) for line in read_checked_lines(path)[1:]]
        self.answers = {key: GeneratedAnswer(*answer) for key, *answer in lines}
        processes.wait()
        self.path = folder / f"rank-{processes.rank}.jsonl"
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        else:
            self.path.write_text(checked_line(binding), encoding="utf-8")

    def add(self, answers: dict[str, GeneratedAnswer]) -> None:
        self.answers |= answers
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(checked_line([key, *answer]) for key, answer in answers.items())


def answer_all(
    model: Any, processor: Any, questions: list[Question], decoding: Decoding, processes: Processes, file: AnswerFile |
    None,
) -> dict[str, GeneratedAnswer]:  # fmt: skip
    """This process' share of the answers, and those that the file has already, by key."""
    found = dict(file.answers) if file is not None else {}
    # Prompts of similar length, with or without an image, share a batch: less padding.
    missing = [question for question in questions if question.key not in found]
    missing.sort(key=lambda question: (question.image is None, len(question.text or ""), question.key))
    mine, size = missing[processes.rank :: processes.world_size], decoding.batch_size
    for batch in processes.progress([mine[start : start + size] for start in range(0, len(mine), size)]):
        prompts = [prompt_for(each) for each in batch]
        answers = generate_answers(model, processor, prompts, decoding.max_new_tokens, decoding.num_beams)
        new = dict(zip((question.key for question in batch), answers, strict=True))
        found |= new
        if file is not None:
            file.add(new)
    return found


def answer_likelihoods(
    model: Any, processor: Any, pairs: list[tuple[Question, str]], decoding: Decoding, processes: Processes
) -> np.ndarray:
    """The probability of each answer, float64 (pairs,); see answer_logprobs. All processes call it, and get all."""
    found, mine, size = list[Any](), range(processes.rank, len(pairs), processes.world_size), decoding.batch_size
    for batch in processes.progress([mine[start : start + size] for start in range(0, len(mine), size)]):
        prompts, texts = [prompt_for(pairs[number][0]) for number in batch], [pairs[number][1] for number in batch]
        for token in (processor.image_token, processor.tokenizer.pad_token, processor.tokenizer.eos_token):
            texts = [text.replace(token, f"{token[0]} {token[1:]}") for text in texts]  # spelled out: no text holds it
        found += zip(batch, answer_logprobs(model, processor, prompts, texts), strict=True)
    return np.exp([logprob for _, logprob in sorted(processes.gather(found))])


def prompt_for(question: Question) -> Prompt:
    images = [load_image(each) for each in images_of(question.image)]
    return [user_message(question.text, len(images), question.transcript)], images
