"""Evaluation during training: held-out loss, sample texts, and the task of --eval_task."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..batching.dataset import ImageReader, SampleDataset, make_loader
from ..batching.images import load_image
from ..batching.index import NAMES, Index
from ..batching.packing import PackedBatch
from ..data.report import Report
from ..data.sample import as_messages, images_of
from ..evaluation.answers import Decoding, Processes
from ..evaluation.evaluate import evaluate_answers
from ..evaluation.generate import generate_texts, held_out_loss
from ..evaluation.tasks import EvalSet, make_eval_set
from .arguments import TrainingArguments
from .fsdp import is_sharded

# Losses, texts and scores; see Evaluator.evaluate.
Evaluation = tuple[dict[str, tuple[float, float]], list[dict[str, Any]], dict[str, dict[str, float]]]


@dataclass
class Evaluator:
    """Evaluates on the validation sets of a run, held_out. Raises ValueError if they hold nothing for --eval_task."""

    arguments: TrainingArguments
    held_out: dict[str, Index]
    read: ImageReader
    processor: Any
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self.eval_set: EvalSet | None = None
        if self.arguments.eval_task != "none":
            most, held_out = self.arguments.eval_task_images, self.held_out.values()
            samples = [index.sample(number) for index in held_out for number in range(min(len(index), most))]
            self.eval_set = make_eval_set(self.arguments.eval_task, samples, Report())

    def evaluate(self, model: Any, plain_model: Any, to_device: Callable[[PackedBatch], PackedBatch]) -> Evaluation:
        """Evaluate a model in eval mode; all ranks call it.

        model, plain_model: as prepared by Accelerate, and unwrapped. to_device: makes a batch ready for the model.
        Returns, of each validation set, its summed loss in nats and its number of supervised tokens; texts for
        samples.jsonl, none but in the main process; and {metric: {score, blind, shuffled}} of --eval_task, its own
        metric first, the same on all ranks."""
        accelerator, batch_size = self.accelerator, self.arguments.per_device_eval_batch_size
        losses, texts = {}, []
        for name, index in self.held_out.items():
            batches = eval_batches(len(index), batch_size, accelerator.process_index, accelerator.num_processes)
            workers = min(self.arguments.dataloader_num_workers, len(batches) // 4)  # a few batches do not pay for one
            loader = make_loader(SampleDataset([index], self.read), batches, self.processor, workers)
            loss = held_out_loss(model, map(to_device, loader), accelerator.device)
            losses[name] = accelerator.reduce(loss, "sum").tolist()
            if accelerator.is_main_process or is_sharded(accelerator):
                texts += sample_texts(plain_model, self.processor, index, self.arguments)
        if self.eval_set is None:
            return losses, texts, {}
        processes = Processes()  # sharded weights: every rank generates everything, since forward passes are collective
        if not is_sharded(accelerator):
            processes = Processes(accelerator.process_index, accelerator.num_processes, gather_object)
        decoding = Decoding(max_new_tokens=self.arguments.max_new_tokens, batch_size=max(batch_size, 32))
        found = evaluate_answers(plain_model, self.processor, self.eval_set, decoding, processes=processes)
        scores, own = found.result["metrics"], self.eval_set.metric
        return losses, texts, {own: scores[own], **scores}


def eval_batches(num_samples: int, batch_size: int, rank: int, world_size: int) -> list[list[tuple[int, int]]]:
    """This rank's share of the held-out samples, in batches of (epoch 0, index).

    All ranks have equally many batches, and the last may be empty: under FSDP a forward pass is collective."""
    mine = range(rank, num_samples, world_size)
    most = -(-num_samples // world_size)
    return [[(0, index) for index in mine[start : start + batch_size]] for start in range(0, most, batch_size)]


def sample_texts(model: Any, processor: Any, held_out: Index, arguments: TrainingArguments) -> list[dict[str, Any]]:
    """The generated answer to the first question about a few held-out images, beside the reference."""
    with_image = (number for number in range(len(held_out)) if held_out.has_image(number))
    prompts, found = [], []
    for sample in map(held_out.sample, islice(with_image, arguments.num_sample_texts)):
        conversation, image = sample.conversations[0], sample.image
        answer = next(place for place, turn in enumerate(conversation) if turn.role == "assistant")
        images = images_of(image)
        prompts.append((as_messages(conversation[:answer], len(images)), [load_image(each) for each in images]))
        name = NAMES.join(f"{len(each)} bytes" if isinstance(each, bytes) else str(each) for each in images)
        question = conversation[answer - 1].text if answer else None
        found.append({"image": name, "question": question, "written": conversation[answer].text})
    generated = generate_texts(model, processor, prompts, arguments.max_new_tokens)
    return [text | {"generated": each} for text, each in zip(found, generated, strict=True)]
