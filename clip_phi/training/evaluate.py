"""Evaluation during training: held-out loss, sample texts, and the task of --eval_task."""

from itertools import islice
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..batching.images import load_image
from ..batching.index import Index
from ..data.report import Report
from ..data.sample import File, as_messages
from ..evaluation.answers import Decoding, Processes
from ..evaluation.evaluate import evaluate_answers
from ..evaluation.generate import generate_texts
from ..evaluation.tasks import EvalSet, make_eval_set
from .arguments import TrainingArguments


def eval_batches(
    num_samples: int, arguments: TrainingArguments, rank: int, world_size: int
) -> list[list[tuple[int, int]]]:
    """This rank's share of the held-out samples, in batches of (epoch 0, index).

    All ranks have as many batches, and the last may be empty: under FSDP a forward pass waits for the others."""
    mine = range(rank, num_samples, world_size)
    size, most = arguments.per_device_train_batch_size, -(-num_samples // world_size)
    return [[(0, index) for index in mine[start : start + size]] for start in range(0, most, size)]


def sample_texts(model: Any, processor: Any, held_out: Index, arguments: TrainingArguments) -> list[dict[str, Any]]:
    """What the model says to the first question about a few held-out images, beside what a person wrote."""
    pictured = (number for number in range(len(held_out)) if held_out.has_image(number))
    chosen = [held_out.sample(number) for number in islice(pictured, arguments.num_sample_texts)]
    prompts, asked, written = [], [], []
    for sample in chosen:
        conversation = sample.conversations[0]
        answer = next(place for place, turn in enumerate(conversation) if turn.role == "assistant")
        assert sample.image is not None
        prompts.append((as_messages(conversation[:answer], has_image=True), load_image(sample.image)))
        asked.append(conversation[answer - 1].text if answer else None)
        written.append(conversation[answer].text)
    generated = generate_texts(model, processor, prompts, arguments.max_new_tokens)
    return [
        {"image": _name(sample.image), "question": question, "generated": text, "written": truth}
        for sample, question, text, truth in zip(chosen, asked, generated, written, strict=True)
    ]


def make_eval_task(arguments: TrainingArguments, held_out: dict[str, Index]) -> EvalSet | None:
    """What --eval_task asks at each evaluation: about the first --eval_task_images of each validation set.

    Raises ValueError if they hold nothing for it."""
    if arguments.eval_task == "none":
        return None
    samples = [
        index.sample(number)
        for index in held_out.values()
        for number in range(min(len(index), arguments.eval_task_images))
    ]
    return make_eval_set(arguments.eval_task, samples, Report())


def run_eval_task(
    model: Any,
    processor: Any,
    eval_set: EvalSet | None,
    arguments: TrainingArguments,
    accelerator: Accelerator,
    alone: bool,
) -> dict[str, dict[str, float]]:
    """{metric: {score, blind, shuffled}} of --eval_task, the task's own metric first; the same on all ranks.

    alone: every rank asks everything, since a forward pass of sharded weights waits for the others."""
    if eval_set is None:
        return {}
    processes = Processes()
    if not alone:
        processes = Processes(accelerator.process_index, accelerator.num_processes, gather_object)
    decoding = Decoding(
        max_new_tokens=arguments.max_new_tokens, batch_size=max(arguments.per_device_train_batch_size, 32)
    )
    metrics = evaluate_answers(model, processor, eval_set, decoding, processes=processes).result["metrics"]
    return {name: metrics[name] for name in sorted(metrics, key=lambda name: name != eval_set.metric)}


def _name(image: File | bytes | None) -> str:
    return f"{len(image)} bytes" if isinstance(image, bytes) else str(image)
