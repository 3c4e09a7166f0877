"""What train_accelerate.py needs before its loop, beside the data: processor, model, texts to look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.errors import HFValidationError

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

from ..batching.features import FeatureCache, fingerprint_of
from ..batching.images import load_image
from ..batching.index import Index
from ..batching.packing import PACKED_ATTENTION
from ..evaluation.generate import generate_texts
from ..samples import File, as_messages
from .arguments import Stage1Arguments, Stage2Arguments, TrainingArguments


def load_processor(arguments: TrainingArguments) -> ClipPhiProcessor:
    with _naming_the_weights(arguments):
        if isinstance(arguments, Stage1Arguments):
            return ClipPhiProcessor.from_backbones(
                arguments.vision_backbone,
                arguments.text_backbone,
                vision_revision=arguments.vision_revision,
                text_revision=arguments.text_revision,
            )
        assert isinstance(arguments, Stage2Arguments)
        return ClipPhiProcessor.from_pretrained(arguments.init_from)


def load_model(
    arguments: TrainingArguments, processor: ClipPhiProcessor, accelerator: Accelerator
) -> ClipPhiForCausalLM:
    """The model with the stage's weights trainable, in float32, and all others frozen, in bfloat16 if so configured.

    Frozen weights are held in the precision they are used in: under autocast, float32 ones are cast at each use."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    with _naming_the_weights(arguments):
        if isinstance(arguments, Stage1Arguments):
            model = _from_backbones(arguments, processor, dtype)
        else:
            assert isinstance(arguments, Stage2Arguments)
            model = _with_lora(arguments, dtype)
    context = model.config.get_text_config().max_position_embeddings
    if arguments.max_length > context:
        accelerator.print(f"--max_length is cut to the decoder's context, {context}")
        arguments.max_length = context
    if not model.config.delta and not arguments.merged:
        accelerator.print("what is trained on is a merged checkpoint, and so will be what is saved")
        arguments.merged = True
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def open_cache(
    arguments: TrainingArguments, model: ClipPhiForCausalLM, processor: ClipPhiProcessor
) -> FeatureCache | None:
    """The cache of --cache_features for this tower and these pixels, or None without that option."""
    if arguments.cache_features is None:
        return None
    fingerprint = fingerprint_of(model, processor, arguments.pixels)
    vision_hidden = next(model.model.projector.parameters()).shape[1]
    shape = (processor.num_image_tokens, vision_hidden)
    return FeatureCache(arguments.cache_features, fingerprint, shape)


@contextmanager
def _naming_the_weights(arguments: TrainingArguments) -> Iterator[None]:
    try:
        yield
    except (OSError, HFValidationError) as error:
        raise OSError(
            f"cannot load {_weights(arguments)}: {error}\nA Hub id (user/name) needs a network the first time, and a "
            "folder must hold config.json. 'make demo' needs no download: its small backbones come with the project."
        ) from error


def _weights(arguments: TrainingArguments) -> str:
    if isinstance(arguments, Stage1Arguments):
        return f"{arguments.vision_backbone} and {arguments.text_backbone}"
    return getattr(arguments, "init_from", "")


def _from_backbones(arguments: Stage1Arguments, processor: ClipPhiProcessor, dtype: torch.dtype) -> ClipPhiForCausalLM:
    return ClipPhiForCausalLM.from_backbones(
        arguments.vision_backbone,
        arguments.text_backbone,
        vision_revision=arguments.vision_revision,
        text_revision=arguments.text_revision,
        image_token_id=processor.image_token_id,
        projector_type=arguments.projector_type,
        dtype=dtype,
    )


def _with_lora(arguments: Stage2Arguments, dtype: torch.dtype) -> ClipPhiForCausalLM:
    from peft import LoraConfig

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
    return model


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def eval_batches(
    num_samples: int, arguments: TrainingArguments, rank: int, world_size: int
) -> list[list[tuple[int, int]]]:
    """This rank's share of the held-out samples, in batches of (epoch 0, index)."""
    mine = range(rank, num_samples, world_size)
    size = arguments.per_device_batch_size
    return [[(0, index) for index in mine[start : start + size]] for start in range(0, len(mine), size)]


def sample_texts(model: Any, processor: Any, held_out: Index, arguments: TrainingArguments) -> list[dict[str, Any]]:
    """What the model says to the first question about a few held-out images, beside what a person wrote."""
    pictured = (number for number in range(len(held_out)) if held_out.has_image(number))
    chosen = [held_out.sample(number) for number in islice(pictured, arguments.num_sample_texts)]
    prompts, asked, written = [], [], []
    for sample in chosen:
        branch = sample.branches[0]
        answer = next(place for place, turn in enumerate(branch) if turn.role == "assistant")
        assert sample.image is not None
        prompts.append((as_messages(branch[:answer], has_image=True), load_image(sample.image)))
        asked.append(branch[answer - 1].text if answer else None)
        written.append(branch[answer].text)
    generated = generate_texts(model, processor, prompts, arguments.max_new_tokens)
    return [
        {"image": _name(sample.image), "question": question, "generated": text, "written": truth}
        for sample, question, text, truth in zip(chosen, asked, generated, written, strict=True)
    ]


def _name(image: File | bytes | None) -> str:
    return f"{len(image)} bytes" if isinstance(image, bytes) else str(image)
