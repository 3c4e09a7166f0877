"""The model and processor that training starts from, and the options as they are resolved for them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.errors import HFValidationError
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

from ..batching import attention
from ..batching.feature_cache import FeatureCache, fingerprint_of
from ..environment import quantization_config
from ..hub.retry import load_with_retries
from .arguments import Stage2Arguments, TrainingArguments
from .fsdp import is_sharded
from .memory import enable_checkpointing, wants_sdpa
from .optim import choose_optimizer

FIELDS = ("projector_type", "vision_feature_layer", "vision_feature_select_strategy")  # of ClipPhiConfig, in stage 1
LINEAR = (torch.nn.Linear, Conv1D)  # GPT-2's Conv1D is one, too


def load_processor(arguments: TrainingArguments) -> ClipPhiProcessor:
    if isinstance(arguments, Stage2Arguments):
        return _load(ClipPhiProcessor.from_pretrained, arguments.init_from)
    return _load_backbones(ClipPhiProcessor, arguments)


def _load_backbones(kind: Any, arguments: Any, **options: Any) -> Any:
    """The processor or the model of stage 1's two backbones."""
    options |= {name: getattr(arguments, name) for name in ("vision_revision", "text_revision", *FIELDS)}
    return _load(kind.from_backbones, arguments.vision_backbone, arguments.text_backbone, **options)


def load_model(arguments: TrainingArguments, accelerator: Accelerator) -> ClipPhiForCausalLM:
    """The model with the stage's weights trainable, in float32, and all others frozen, in bfloat16 if so configured.

    Frozen weights are held in the precision they are used in: under autocast, float32 ones are cast at each use."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    if isinstance(arguments, Stage2Arguments):
        model = _load_start(arguments, dtype, accelerator)
    else:
        model = _load_backbones(ClipPhiForCausalLM, arguments, dtype=dtype)
    if getattr(model, "hf_quantizer", None) is None and not is_sharded(accelerator):
        model = model.to(accelerator.device)
    attention.refuse_other_attention(model)
    make_trainable(model, arguments, accelerator.device, dtype)
    return model


def make_trainable(model: Any, arguments: TrainingArguments, device: torch.device, dtype: torch.dtype) -> None:
    """Make the loaded model what the stage trains; the arguments are those of load_model.

    device, dtype: where it will be, and the precision of its frozen weights."""
    model.freeze_backbones()
    if isinstance(arguments, Stage2Arguments):
        if model.config.adapter is not None:
            continue_lora(model, arguments)
        elif arguments.tune_decoder == "full":
            model.model.language_model.requires_grad_(True)
            model.lm_head.requires_grad_(True)
        else:
            add_lora(model, arguments)
    model.model.projector.requires_grad_(True)  # after PEFT, which freezes all but the adapter
    model.set_attn_implementation({"text_config": choose_attention(arguments, device, dtype)})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if dtype != torch.float32:
        keep_dtype(model, dtype)
    if arguments.gradient_checkpointing:
        enable_checkpointing(model)


def choose_attention(arguments: TrainingArguments, device: torch.device, dtype: torch.dtype) -> str:
    """What --attention means on this device. Raises ValueError if there is no kernel for --attention varlen."""
    if arguments.attention == "varlen" and not attention.has_varlen_kernel(device, dtype):
        needed, found = "bf16 or fp16 on an NVIDIA GPU of capability 8.0 or later", str(dtype).removeprefix("torch.")
        way_out = "--attention sdpa works everywhere"
        raise ValueError(f"--attention varlen needs {needed}, not {found} on {device}; {way_out}")
    return attention.SDPA_PACKED_ATTENTION if wants_sdpa(arguments) else attention.PACKED_ATTENTION


def keep_dtype(model: ClipPhiForCausalLM, dtype: torch.dtype) -> None:
    """Let the decoder's activations be of this dtype, in which autocast multiplies.

    Under autocast a norm's output is float32, and so is all that follows from it in quantised layers, which answer in
    the dtype of their input. And PEFT would cast the input of a LoRA matrix to the float32 of its weights."""
    for module in model.model.language_model.modules():
        if type(module).__name__.endswith("Norm"):
            module.register_forward_hook(lambda module, inputs, output: output.to(dtype))
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def resolve(arguments: TrainingArguments, accelerator: Accelerator, model: ClipPhiForCausalLM) -> TrainingArguments:
    """A copy of the options with all decided that depends on the model and the machine; each decision is printed.

    Decides optim, max_length, merged, per_device_eval_batch_size and, of a model with an adapter, lora_*."""
    config = model.config
    changes: dict[str, Any] = {"optim": choose_optimizer(arguments.optim, accelerator.device, is_sharded(accelerator))}
    context = attention.context_length(config)
    if context is not None and arguments.max_length > context:
        accelerator.print(f"--max_length is cut to the decoder's context, {context}")
        changes["max_length"] = context
    if context is not None and arguments.max_new_tokens >= context:
        raise ValueError(f"--max_new_tokens {arguments.max_new_tokens}: the decoder's context has {context} tokens")
    changes_decoder = isinstance(arguments, Stage2Arguments) and arguments.tune_decoder == "full"
    if not arguments.merged and (changes_decoder or not config.delta):
        reason = "--tune_decoder full changes the decoder" if changes_decoder else "training starts from a merged model"
        accelerator.print(f"{reason}, so a merged model is saved")
        changes["merged"] = True
    if config.adapter is not None:
        changes |= adapter_options(model)
        start = getattr(arguments, "init_from", "")
        accelerator.print(f"training continues the adapter of {start}: rank {changes['lora_r']}")
    images = arguments.per_device_eval_batch_size or arguments.per_device_train_batch_size
    return dataclasses.replace(arguments, per_device_eval_batch_size=images, **changes)


def describe_batches(arguments: TrainingArguments, accelerator: Accelerator) -> str:
    """The line about the optimizer and the size of a step."""
    tokens, images = arguments.max_tokens_per_batch, arguments.per_device_train_batch_size
    size = f"up to {tokens:,} tokens" if tokens else f"{images:,} images"
    size += f" (evaluation: {arguments.per_device_eval_batch_size:,} images)"
    passes = f"forward passes in a step: {arguments.gradient_accumulation_steps * accelerator.num_processes:,}"
    precision = f"mixed precision {accelerator.mixed_precision}"
    return f"optimizer {arguments.optim}; {precision}; in a forward pass {size}; {passes}"


def open_cache(arguments: TrainingArguments, model: Any, processor: ClipPhiProcessor) -> FeatureCache | None:
    """The cache of --cache_features for this tower and this image processing, or None without that option."""
    if arguments.cache_features is None:
        return None
    shape = (processor.num_image_tokens, next(model.model.projector.parameters()).shape[1])  # of an image's features
    return FeatureCache(arguments.cache_features, fingerprint_of(model, processor, arguments.image_processing), shape)


def _load(load: Callable[..., Any], *names: str, **options: Any) -> Any:
    """load_with_retries, whose errors name the backbones or the model, and the ways out."""
    try:
        return load_with_retries(load, *names, **options)
    except (OSError, HFValidationError) as error:
        hint = "A Hub id (user/name) needs a network the first time, and a folder must hold config.json."
        demo = "'make demo' needs no download: it has its own backbones."
        raise OSError(f"cannot load {' and '.join(names)}: {error}\n{hint} {demo}") from error


def _load_start(arguments: Stage2Arguments, dtype: torch.dtype, accelerator: Accelerator) -> ClipPhiForCausalLM:
    kind, options = arguments.quantization, {}
    if kind != "none":
        options = {"quantization_config": quantization_config(kind, dtype), "device_map": {"": accelerator.device}}
    model = _load(ClipPhiForCausalLM.from_pretrained, arguments.init_from, dtype=dtype, **options)
    if kind != "none" and not model.config.delta:
        why = "only a delta can be saved beside a quantised decoder; give the delta"
        raise ValueError(f"--quantization {kind}: {arguments.init_from} is a merged model, and {why}")
    if kind == "nf4":
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False  # it would rewrite the weights at an evaluation
    model.config.caption_instruction = arguments.caption_instruction
    return model


def add_lora(model: ClipPhiForCausalLM, arguments: Stage2Arguments) -> None:
    """Source: LoRA, arXiv 2106.09685; on all linear layers and 4-bit weights: QLoRA, arXiv 2305.14314."""
    from peft import LoraConfig

    layers = [name for name, module in model.model.language_model.named_modules() if isinstance(module, LINEAR)]
    targets = sorted({name.rpartition(".")[2] for name in layers})
    if arguments.lora_targets != "auto":
        wanted = [name.strip() for name in arguments.lora_targets.split(",")]
        if unknown := ", ".join(sorted(set(wanted) - set(targets))):
            raise ValueError(f"--lora_targets: the decoder has no linear layer {unknown}; it has {', '.join(targets)}")
        targets = wanted
    # The tower has layers of the same names: only the decoder's are meant.
    pattern = rf"model\.language_model\..*\.({'|'.join(targets)})"
    sizes = {"r": arguments.lora_r, "lora_alpha": arguments.lora_alpha, "lora_dropout": arguments.lora_dropout}
    model.add_adapter(LoraConfig(target_modules=pattern, **sizes))
    share_dropout(model)


def share_dropout(model: ClipPhiForCausalLM) -> None:
    """Replace the dropout of all LoRA layers by SharedDropout."""
    dropped = WeakTensorKeyDictionary()
    for layer in model.model.language_model.modules():
        for name, drop in getattr(layer, "lora_dropout", {}).items():
            if isinstance(drop, torch.nn.Dropout):
                layer.lora_dropout[name] = SharedDropout(drop.p, dropped).train(drop.training)
    model.model.language_model.register_forward_hook(lambda *_: dropped.clear())


class SharedDropout(torch.nn.Dropout):
    """Dropout with one mask for all layers with the same input, such as q_proj, k_proj and v_proj.

    Each layer's input is dropped as by torch.nn.Dropout, but not independently of the other layers' inputs. A CPU makes
    the mask from 16 random bits for each value, in half the time: there p is rounded to a multiple of 2**-16."""

    def __init__(self, p: float, dropped: WeakTensorKeyDictionary):
        """dropped: the last inputs of layers, and what is left of them, for all layers of a model."""
        super().__init__(p)
        self.dropped = dropped

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return input
        if input not in self.dropped:
            self.dropped[input] = self._drop(input)
            if len(self.dropped) > 2:  # phi's attention and MLP have the same input
                del self.dropped[next(iter(self.dropped))]
        return self.dropped[input]

    def _drop(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        bits = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        level = min(round(self.p * 2**16), 2**16 - 1)
        kept = (bits[: input.numel()] >= level - 2**15).to(input.dtype)
        return input * kept.mul_(2**16 / (2**16 - level)).view(input.shape)


def continue_lora(model: ClipPhiForCausalLM, arguments: Stage2Arguments) -> None:
    """Train the decoder's part of the adapter that the model has. An adapter of the tower stays frozen.

    Raises ValueError if an option asks for another adapter."""
    way_out = "leave it out, or start from a copy saved with save_pretrained(FOLDER, merged=True), which has none"
    if arguments.tune_decoder == "full":
        raise ValueError(f"--tune_decoder full: {arguments.init_from} has a LoRA adapter: {way_out}")
    own = adapter_options(model)
    for name in ("lora_r", "lora_alpha", "lora_targets"):
        wanted = getattr(arguments, name)
        if name == "lora_targets":
            wanted = own[name] if wanted == "auto" else ",".join(sorted(map(str.strip, wanted.split(","))))
        if name in arguments.given and wanted != own[name]:
            raise ValueError(f"--{name} {wanted}: the adapter of {arguments.init_from} has {own[name]}: {way_out}")
    (config,) = model.peft_config.values()
    config.inference_mode = False
    if "lora_dropout" in arguments.given:
        config.lora_dropout = arguments.lora_dropout
    for layer in model.model.language_model.modules():
        for name in getattr(layer, "lora_dropout", {}):  # which the model was loaded and frozen without
            drop = torch.nn.Dropout(config.lora_dropout) if config.lora_dropout else torch.nn.Identity()
            layer.lora_dropout[name] = drop.train(layer.training)
    share_dropout(model)
    for name, parameter in model.model.language_model.named_parameters():
        parameter.requires_grad = "lora_" in name


def adapter_options(model: ClipPhiForCausalLM) -> dict[str, Any]:
    """The options of stage 2 that describe the adapter which a model has."""
    (config,) = model.peft_config.values()
    layers = {name.rpartition(".")[2] for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    sizes = {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    return sizes | {"lora_targets": ",".join(sorted(layers))}
