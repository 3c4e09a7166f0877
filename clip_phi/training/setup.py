"""What train_accelerate.py needs before its loop: samples, model, processor."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.errors import HFValidationError

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

from ..batching.images import load_image
from ..evaluation.generate import generate_texts
from ..samples import Sample, as_messages
from ..sources.coco import read_coco_captions
from ..sources.instruct import read_llava_instruct
from .arguments import Stage1Arguments, Stage2Arguments, TrainingArguments


def read_samples(arguments: TrainingArguments) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples. Without held-out annotations, the last images of the training file are held out.

    Raises ValueError if nothing is left to train on, or an error of the reader."""
    read = read_coco_captions if isinstance(arguments, Stage1Arguments) else read_llava_instruct
    train = read(Path(arguments.train_annotations), Path(arguments.train_images))
    if arguments.eval_annotations:
        held_out = read(Path(arguments.eval_annotations), Path(arguments.eval_images))
    else:
        held_out, train = train[-arguments.holdout_images :], train[: -arguments.holdout_images]
    if not train or not held_out:
        raise ValueError(
            f"{len(train)} samples to train on and {len(held_out)} held out of {arguments.train_annotations}"
        )
    return train, held_out[: arguments.max_eval_images]


def load_model(arguments: TrainingArguments, accelerator: Accelerator) -> tuple[ClipPhiForCausalLM, ClipPhiProcessor]:
    """The model with the stage's weights trainable, in float32, and all others frozen, in bfloat16 if so configured.

    Frozen weights are held in the precision they are used in: under autocast, float32 ones are cast at each use."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    try:
        if isinstance(arguments, Stage1Arguments):
            model, processor = _from_backbones(arguments, dtype)
        else:
            assert isinstance(arguments, Stage2Arguments)
            model, processor = _with_lora(arguments, dtype)
    except (OSError, HFValidationError) as error:
        raise OSError(
            f"cannot load {_weights(arguments)}: {error}\nA Hub id (user/name) needs a network the first time, and a "
            "folder must hold config.json. 'make demo' needs no download: its small backbones come with the project."
        ) from error
    context = model.config.get_text_config().max_position_embeddings
    if arguments.max_length > context:
        accelerator.print(f"--max_length is cut to the decoder's context, {context}")
        arguments.max_length = context
    if not model.config.delta and not arguments.merged:
        accelerator.print("what is trained on is a merged checkpoint, and so will be what is saved")
        arguments.merged = True
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, processor


def _weights(arguments: TrainingArguments) -> str:
    if isinstance(arguments, Stage1Arguments):
        return f"{arguments.vision_backbone} and {arguments.text_backbone}"
    return getattr(arguments, "init_from", "")


def _from_backbones(arguments: Stage1Arguments, dtype: torch.dtype) -> tuple[ClipPhiForCausalLM, ClipPhiProcessor]:
    revisions: dict[str, Any] = {"vision_revision": arguments.vision_revision, "text_revision": arguments.text_revision}
    backbones = (arguments.vision_backbone, arguments.text_backbone)
    processor = ClipPhiProcessor.from_backbones(*backbones, **revisions)
    model = ClipPhiForCausalLM.from_backbones(
        *backbones,
        **revisions,
        image_token_id=processor.image_token_id,
        projector_type=arguments.projector_type,
        dtype=dtype,
    )
    return model, processor


def _with_lora(arguments: Stage2Arguments, dtype: torch.dtype) -> tuple[ClipPhiForCausalLM, ClipPhiProcessor]:
    from peft import LoraConfig

    processor = ClipPhiProcessor.from_pretrained(arguments.init_from)
    model = ClipPhiForCausalLM.from_pretrained(arguments.init_from, dtype=dtype)
    model.freeze_backbones()
    targets = "|".join(name.strip() for name in arguments.lora_targets.split(","))
    # The tower has layers of the same names: only the decoder's are meant.
    model.add_adapter(
        LoraConfig(
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=rf"model\.language_model\..*\.({targets})",
        )
    )
    model.model.projector.requires_grad_(True)
    model.config.caption_instruction = arguments.caption_instruction
    return model, processor


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def eval_batches(
    num_samples: int, arguments: TrainingArguments, accelerator: Accelerator
) -> list[list[tuple[int, int]]]:
    """This rank's share of the held-out samples, in batches of (epoch 0, index)."""
    mine = range(accelerator.process_index, num_samples, accelerator.num_processes)
    size = arguments.per_device_batch_size
    return [[(0, index) for index in mine[start : start + size]] for start in range(0, len(mine), size)]


def sample_texts(
    model: Any, processor: Any, samples: list[Sample], arguments: TrainingArguments
) -> list[dict[str, Any]]:
    """What the model says to the first turn about a few held-out images, beside what a person wrote."""
    chosen = [sample for sample in samples if sample.image is not None][: arguments.num_sample_texts]
    prompts, asked, written = [], [], []
    for sample in chosen:
        branch = sample.branches[0]
        question = branch[:1] if branch[0].role == "user" else ()
        assert sample.image is not None
        prompts.append((as_messages(question, has_image=True), load_image(sample.image)))
        asked.append(question[0].text if question else None)
        written.append(branch[len(question)].text)
    generated = generate_texts(model, processor, prompts, arguments.max_new_tokens)
    return [
        {"image": str(sample.image), "question": question, "generated": text, "written": truth}
        for sample, question, text, truth in zip(chosen, asked, generated, written, strict=True)
    ]
