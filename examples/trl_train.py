"""Train a Clip-Phi model with TRL's SFTTrainer, DPOTrainer or GRPOTrainer, and save the result as a delta again.

    pip install 'clip-phi[trl]'
    clip-phi preferences outputs/stage2 outputs/pairs.parquet --task captions --data coco:...
    python examples/trl_train.py --method dpo --model outputs/stage2 --data outputs/pairs.parquet
    clip-phi evaluate outputs/trl --task captions --data coco:...

sft learns the answers of conversations; dpo learns pairs of a better and a worse answer, of clip-phi preferences or of
rows with chosen and rejected; grpo samples answers to questions and learns from their VQA accuracy. The projector is
trained, and the decoder's LoRA: that of the model, or with --lora_r a new one. Tower and decoder are frozen. TRL pads
each batch: for sft, train_accelerate.py is several times faster on the same data.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from clip_phi.batching.images import load_image
from clip_phi.data.hf_dataset import open_table
from clip_phi.data.report import Report
from clip_phi.data.sample import Turn, as_messages, images_of
from clip_phi.data.source import DataSource, parse_source
from clip_phi.evaluation.answer_metrics import vqa_accuracy
from clip_phi.evaluation.tasks import MAX_ANSWER_WORDS, read_samples
from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

# Peak learning rates: preferences move a trained model a little.
LEARNING_RATES = {"sft": 2e-4, "dpo": 2e-5, "grpo": 2e-5}
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    # answers and their end tokens, as train_accelerate.py does; image tokens must not be cut
    "sft": {"assistant_only_loss": True, "max_length": None},
    "dpo": {"max_length": None},
    "grpo": {"num_generations": 8, "max_completion_length": 16},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", choices=[*OWN_SETTINGS], required=True, help="what is learnt; see above")
    parser.add_argument("--model", default="outputs/stage2", help="folder or Hub id of a delta model")
    parser.add_argument("--data", required=True, help="[KIND:]PATH[,option=value...], as in train_accelerate.py")
    parser.add_argument("--output_dir", default="outputs/trl", help="folder for the trained model")
    parser.add_argument("--lora_r", type=int, default=0, help="rank of a new LoRA on the decoder; 0: none")
    parser.add_argument("--learning_rate", type=float, help=f"peak, of all trained weights (default: {LEARNING_RATES})")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8, help="conversations in a forward pass")
    parser.add_argument("--num_train_epochs", type=float, default=1.0, help="passes over the data")
    parser.add_argument("--max_steps", type=int, default=-1, help="number of steps instead of --num_train_epochs")
    parser.add_argument("--seed", type=int, default=0, help="random seed of order, dropout and samples")
    return parser.parse_args()


def records(method: str, data: str) -> Iterator[dict[str, Any]]:
    """Rows for TRL: the bytes of the images, and messages; TRL adds the <image> places. Prints what is not used."""
    report, unused = Report(), Counter[str]()
    if method == "dpo":
        yield from pairs(data)
        return
    for sample in read_samples([parse_source(data)], report):
        images = images_of(sample.image)
        content = [{"bytes": image if isinstance(image, bytes) else image.read()} for image in images]
        for conversation in sample.conversations:
            if not images:
                unused["no image"] += 1
            elif method == "sft":
                yield {"images": content, "messages": texts(conversation)}
            else:
                answer = conversation[1] if len(conversation) > 1 and conversation[0].role == "user" else None
                if answer is None or len(answer.text.split()) > MAX_ANSWER_WORDS:
                    unused["no short answer to a first question"] += 1
                    continue
                references = list(answer.references or (answer.text,))
                yield {"images": content, "prompt": texts(conversation[:1]), "references": references}
    report.refuse_bad(0.01)
    for reason, count in (unused + report.skipped).items():
        print(f"{count:,} conversations are not used: {reason}")


def pairs(data: str) -> Iterator[dict[str, Any]]:
    """A prompt with a better and a worse answer, each a text or messages. Prints the rows without a pair, by reason.

    In place of chosen and rejected may be completions with ratings, as in VLFeedback (arXiv 2410.09421): [{"response",
    "annotations": {aspect: {"Rating": "4"}}}]. The best and the worst by mean rating are taken."""
    source, unused = parse_source(data), Counter[str]()
    for record in open_table(source.path, **source.table_options()):
        images = record.get("images") or [record.get("image")]
        prompt = record.get("prompt") or record.get("question")
        worse, better = record.get("rejected"), record.get("chosen")
        if record.get("completions"):
            worse, better = worst_and_best(record["completions"])
        if not (images[0] and prompt and worse and better) or worse == better:
            unused["no image, prompt, or two different answers"] += 1
            continue
        row: dict[str, Any] = {"images": [cell(image, source) for image in images]}
        for name, role, part in (
            ("prompt", "user", prompt),
            ("chosen", "assistant", better),
            ("rejected", "assistant", worse),
        ):
            turns = [{"role": role, "content": part}] if isinstance(part, str) else part
            row[name] = [turn | {"content": turn["content"].replace("<image>", "").strip()} for turn in turns]
        yield row
    for reason, count in unused.items():
        print(f"{count:,} rows are not used: {reason}")


def cell(image: Any, source: DataSource) -> dict[str, Any]:
    """An image of a table, or the name of one in the folder images=, as TRL's data hold it."""
    data = image["bytes"] if isinstance(image, dict) else (source.images / image).read_bytes()
    load_image(data)  # raises an error that names the fault
    return {"bytes": data}


def worst_and_best(completions: Any) -> tuple[str | None, str | None]:
    """None twice if all are rated alike, or not at all. A rating that is no number is left out."""
    if isinstance(completions, dict):  # as datasets stores a list of objects that was a Sequence
        completions = [dict(zip(completions, each, strict=True)) for each in zip(*completions.values(), strict=True)]
    means: dict[float, str] = {}
    for each in completions:
        marks = [mark["Rating"] for mark in each["annotations"].values() if mark]
        numbers = [float(mark) for mark in marks if str(mark).replace(".", "", 1).isdigit()]
        if numbers:
            means.setdefault(sum(numbers) / len(numbers), each["response"])
    return (means[min(means)], means[max(means)]) if len(means) > 1 else (None, None)


def texts(conversation: tuple[Turn, ...]) -> list[dict[str, str]]:
    """With transcripts of speech in the text."""
    messages = as_messages(conversation, 0)
    content = ["".join(item["text"] for item in message["content"]) for message in messages]
    return [{"role": message["role"], "content": text} for message, text in zip(messages, content, strict=True)]


def accuracy(completions: list[list[dict[str, str]]], references: list[list[str]], **_: Any) -> list[float]:
    """GRPO's reward: VQA accuracy, 0 to 1."""
    return vqa_accuracy([completion[-1]["content"] for completion in completions], references).tolist()


def main() -> None:
    arguments = parse_arguments()
    try:
        import trl
    except ImportError as error:
        raise SystemExit("this example needs TRL: pip install 'clip-phi[trl]'") from error
    from datasets import Dataset, Features, Image, List, Value
    from peft import LoraConfig

    method = arguments.method
    model = ClipPhiForCausalLM.from_pretrained(arguments.model)
    processor = ClipPhiProcessor.from_pretrained(arguments.model)
    if arguments.lora_r:
        # "model.language_model." keeps LoRA off the tower, whose layers have the same names.
        layers = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|dense|o_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
        model.add_adapter(LoraConfig(r=arguments.lora_r, lora_alpha=2 * arguments.lora_r, target_modules=layers))
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name or name.startswith("model.projector."))
    message = List({"role": Value("string"), "content": Value("string")})
    columns = {"sft": ["messages"], "dpo": ["prompt", "chosen", "rejected"], "grpo": ["prompt"]}[method]
    features = {"images": List(Image())} | dict.fromkeys(columns, message)
    features |= {"references": List(Value("string"))} if method == "grpo" else {}
    rows = list(records(method, arguments.data))
    if not rows:
        raise SystemExit(f"--data {arguments.data} has nothing to learn for {method}")
    settings = getattr(trl, f"{method.upper()}Config")(
        output_dir=f"{arguments.output_dir}/checkpoints",
        learning_rate=arguments.learning_rate or LEARNING_RATES[method],
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps,
        seed=arguments.seed,
        gradient_checkpointing=False,
        bf16=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        report_to=[],
        **OWN_SETTINGS[method],
    )
    rewards = {"reward_funcs": accuracy} if method == "grpo" else {}
    trainer = getattr(trl, f"{method.upper()}Trainer")(
        model,
        args=settings,
        train_dataset=Dataset.from_list(rows, features=Features(features)),
        processing_class=processor,
        **rewards,
    )
    trainer.train()
    trainer.model.save_pretrained(arguments.output_dir)  # with peft_config: trainer.model.get_base_model()
    processor.save_pretrained(arguments.output_dir)
    print(f"saved in {arguments.output_dir}")


if __name__ == "__main__":
    main()
