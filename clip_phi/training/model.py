"""What train_accelerate.py needs before its loop, beside the data: processor, model, texts to look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.errors import HFValidationError
from transformers.pytorch_utils import Conv1D

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

from ..batching.attention import PACKED_ATTENTION
from ..batching.feature_cache import FeatureCache, fingerprint_of
from ..hub.retry import load_with_retries
from .arguments import Stage1Arguments, Stage2Arguments, TrainingArguments


def load_processor(arguments: TrainingArguments) -> ClipPhiProcessor:
    with _naming_the_weights(arguments):
        if isinstance(arguments, Stage1Arguments):
            return load_with_retries(
                ClipPhiProcessor.from_backbones,
                arguments.vision_backbone,
                arguments.text_backbone,
                vision_revision=arguments.vision_revision,
                text_revision=arguments.text_revision,
            )
        assert isinstance(arguments, Stage2Arguments)
        return load_with_retries(ClipPhiProcessor.from_pretrained, arguments.init_from)


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
            model = _from_checkpoint(arguments, dtype, accelerator)
    context = model.config.get_text_config().max_position_embeddings
    if arguments.max_length > context:
        accelerator.print(f"--max_length is cut to the decoder's context, {context}")
        arguments.max_length = context
    if isinstance(arguments, Stage2Arguments) and arguments.tune_decoder == "full" and not arguments.merged:
        accelerator.print("--tune_decoder full: what is saved is a merged checkpoint, since all of it changes")
        arguments.merged = True
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
    fingerprint = fingerprint_of(model, processor, arguments.image_processing)
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
    return load_with_retries(
        ClipPhiForCausalLM.from_backbones,
        arguments.vision_backbone,
        arguments.text_backbone,
        vision_revision=arguments.vision_revision,
        text_revision=arguments.text_revision,
        image_token_id=processor.image_token_id,
        projector_type=arguments.projector_type,
        dtype=dtype,
    )


def _from_checkpoint(arguments: Stage2Arguments, dtype: torch.dtype, accelerator: Accelerator) -> ClipPhiForCausalLM:
    options: dict[str, Any] = {}
    if arguments.quantization != "none":
        options["quantization_config"] = _quantization(arguments.quantization, dtype)
        options["device_map"] = {"": accelerator.device}
    model = load_with_retries(ClipPhiForCausalLM.from_pretrained, arguments.init_from, dtype=dtype, **options)
    if arguments.quantization != "none" and not model.config.delta:
        raise ValueError(
            f"--quantization {arguments.quantization}: {arguments.init_from} is a merged checkpoint, and only a delta "
            "can be saved beside a quantised decoder; give the delta"
        )
    if arguments.quantization == "nf4":
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False  # it would rewrite the weights at an evaluation
    model.freeze_backbones()
    if arguments.tune_decoder == "full":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    else:
        add_lora(model, arguments)
    model.model.projector.requires_grad_(True)
    model.config.caption_instruction = arguments.caption_instruction
    return model


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if not find_spec("bitsandbytes"):
        raise ImportError(f"--quantization {kind} needs bitsandbytes: pip install 'clip-phi[cuda]'")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def add_lora(model: ClipPhiForCausalLM, arguments: Stage2Arguments) -> None:
    """Source: LoRA, arXiv 2106.09685; on all linear layers and 4-bit weights: QLoRA, arXiv 2305.14314."""
    from peft import LoraConfig

    layers = [name for name, module in model.model.language_model.named_modules() if is_linear(module)]
    targets = sorted({name.rpartition(".")[2] for name in layers})
    if arguments.lora_targets != "auto":
        wanted = [name.strip() for name in arguments.lora_targets.split(",")]
        if unknown := sorted(set(wanted) - set(targets)):
            raise ValueError(
                f"--lora_targets: the decoder has no linear layer {', '.join(unknown)}; it has {', '.join(targets)}"
            )
        targets = wanted
    # The tower has layers of the same names: only the decoder's are meant.
    model.add_adapter(
        LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=rf"model\.language_model\..*\.({'|'.join(targets)})",
        )
    )


def is_linear(module: torch.nn.Module) -> bool:
    """GPT-2's Conv1D is one, too."""
    return isinstance(module, (torch.nn.Linear, Conv1D))


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
