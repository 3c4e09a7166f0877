"""The memory and FLOPs of a training step, without running one; and the largest pack that fits a GPU.

A formula over the shapes of the model. benchmarks/plan_counting.py counts the same tensor by tensor, and
tests/test_plan.py compares the two. What cannot be counted is assumed, and marked as such."""

import bisect
import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object

from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM
from modeling_clip_phi.backbones import measure_tower

from ..batching.attention import SDPA_PACKED_ATTENTION, has_varlen_kernel, make_pack_layout
from ..batching.encode import Encoded
from ..batching.packing import build_shared_prefix, pack_samples
from ..environment import GPUS, Gpu
from .arguments import Stage2Arguments, TrainingArguments
from .fsdp import is_sharded

Ids = Sequence[Sequence[int]]
GIB = 2**30
CPU = Gpu("cpu", 0.1, "cpu-16", "CPU, 16 GB", 16e9 / GIB, "float32", has_varlen=False)  # assumed peak, of one core
CARDS = {key: gpu for gpu in (*GPUS, CPU) for key in gpu.key.split()}
# Bytes that a process takes before it has a tensor, and what the allocator holds beyond the tensors of a step, as a
# share of them: on CUDA assumed; on a CPU measured (docs/true_size.md).
CONTEXT, RESERVE = {True: int(0.6 * GIB), False: int(0.65 * GIB)}, {True: 0.05, False: 0.0}
CAPTION_LENGTHS = (11, 12, 12, 11, 12)  # 11.6 tokens of phi-2's tokenizer; the end token is no input
CONVERSATION_LENGTHS, ANSWERS = (165, 165), 250  # assumed: two of an image in LLaVA-Instruct-150K; tokens of answers
USUAL_TOKENS = 4096  # of a pack, where memory cannot be planned
# The decoder layers that the formula knows, by their linear layers and number of norms.
PHI = ({"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}, 1)
LLAMA = ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 2)
# peaks and freed: what the decoder's passes take at their peak; memory.yaml says how it was counted.
COUNTED = yaml.safe_load(Path(__file__).with_name("memory.yaml").read_text(encoding="utf-8"))


def wants_sdpa(arguments: TrainingArguments) -> bool:
    """Whether --attention is SDPA where the varlen kernel is, too.

    In stage 1 the kernel would keep the image's keys and values once for each of its captions: 2.4 MB a token of
    phi-2, against 1.7 with SDPA. In stage 2 it keeps as little, and is faster."""
    return arguments.attention == "sdpa" or (arguments.attention == "auto" and arguments.stage == 1)


class Formula:
    """Memory and FLOPs of training a model on a card.

    Raises ValueError if the decoder's layers are neither like Phi's nor like Llama's."""

    def __init__(self, config: Any, arguments: TrainingArguments, card: Gpu):
        config = copy.deepcopy(config)  # a new model, or config, resets the attention of its parts
        with torch.device("meta"):
            self.model = model = ClipPhiForCausalLM(config)
        has_varlen = card.has_varlen and not wants_sdpa(arguments)
        self.arguments, self.card = arguments, card._replace(has_varlen=has_varlen)
        self.is_cuda = card.dtype != "float32"
        self.vision, text = config.vision_config, config.get_text_config()
        layers: Any = getattr(model.model.language_model, "layers", [model.lm_head])
        linear = {name: each for name, each in layers[0].named_modules() if isinstance(each, torch.nn.Linear)}
        norms = [each for each in layers[0].modules() if type(each).__name__.endswith("Norm")]
        kind = ({name.rpartition(".")[2] for name in linear}, len(norms))
        if kind not in (PHI, LLAMA):
            raise ValueError(f"plan knows decoder layers like Phi's and Llama's, not those of {text.model_type}")
        self.is_llama, self.layers, self.norms = kind == LLAMA, len(layers), len(norms)
        self.linear = [(each.in_features, each.out_features) for each in linear.values()]
        self.hidden, self.inner, self.heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
        self.width, self.vocabulary = linear["self_attn.q_proj"].out_features, model.lm_head.out_features
        self.rotary = int(self.width / self.heads * text.rope_parameters.get("partial_rotary_factor", 1.0))
        self.patches, _ = measure_tower(config, *image_size(self.vision))
        every = ClipPhiConfig(vision_config=self.vision, text_config=text, vision_feature_select_strategy="full")
        self.tower_tokens, _ = measure_tower(every, *image_size(self.vision))
        self.projector_sizes = weights(model.model.projector, torch.nn.Linear)
        stage2 = arguments if isinstance(arguments, Stage2Arguments) else None
        self.full = stage2 is not None and stage2.tune_decoder == "full"
        self.rank = stage2.lora_r if stage2 is not None and not self.full else 0
        self.masks = int(stage2 is not None and stage2.lora_dropout > 0)
        self.quantization = stage2.quantization if stage2 is not None else "none"
        self.kind = "frozen" if stage2 is None else "full" if self.full else "lora" if self.masks else "lora0"
        self.kind = "int8" if self.quantization == "int8" else self.kind
        parts = [model.model.projector, *([model.model.language_model, model.lm_head] if self.full else [])]
        lora = [self.rank * size for pair in self.linear for size in pair] * self.layers if self.rank else []
        self.trained = [*{id(each): each.numel() for part in parts for each in part.parameters()}.values(), *lora]
        self.parameters = sum(each.numel() for each in model.parameters()) + sum(lora)

    def bill(self, conversation_ids: Ids, supervised: int, copies: int = 1) -> dict[str, int]:
        """The memory in bytes, by item, of a run whose largest pack is this; see step."""
        step = self.step(conversation_ids, supervised, copies)[0]
        bill = self.fixed_bytes() | {name: int(size) for name, size in step.items()}
        return bill | {"allocator": int(RESERVE[self.is_cuda] * (sum(bill.values()) - bill["context"]))}

    def fixed_bytes(self) -> dict[str, int]:
        """What a run holds whatever the size of its steps, by item."""
        trained, size = sum(self.trained), 2 if self.is_cuda else 4
        frozen, optim = (self.parameters - trained) * size, self.arguments.optim
        for inputs, outputs in self.linear * self.layers if self.quantization != "none" else []:
            # int8: a byte, a float32 for each output. nf4: half a byte, a byte for each block of 64, a float32 for each
            # 256 of those, and tables of 16 and 256 float32 and an offset.
            weights, blocks = inputs * outputs, -(-inputs * outputs // 64)
            nf4 = -(-weights // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
            frozen += (weights + 4 * outputs if self.quantization == "int8" else nf4) - weights * size
        # bitsandbytes: two states of a byte, a float32 for each block of 256; small tensors keep float32 states.
        optimizer = sum(2 * each + 8 * -(-each // 256) if each >= 4096 else 8 * each for each in self.trained)
        if optim == "adamw_torch_fused" or (optim == "auto" and not self.is_cuda):
            optimizer = 8 * trained
        items = {"frozen weights": frozen, "trained weights": 4 * trained, "gradients": 4 * trained}
        return items | {"optimizer": optimizer, "context": CONTEXT[self.is_cuda]}

    def step(self, conversation_ids: Ids, supervised: int, copies: int = 1) -> tuple[dict[str, float], float, float]:
        """A step on a pack: its memory in bytes by item, FLOPs of tower and projector, and all other FLOPs.

        conversation_ids: of each sample and token, as in make_pack_layout. supervised: tokens with a label in all of
        them. copies: how often they are in the pack."""
        layout, supervised = make_pack_layout(conversation_ids), copies * supervised
        tokens, images = copies * sum(map(len, conversation_ids)), copies * sum(0 in ids for ids in conversation_ids)
        hidden, inner, cuda, vision = self.hidden, self.inner, self.is_cuda, self.vision
        # Bytes of a number in a product and its inputs (see keep_dtype), and in the residual stream.
        product = 2 if cuda else 4
        stream = 4 if self.full else product
        # Kept for the backward pass, in bytes for each token: of a norm the input in float32 and statistics, and of a
        # trained RMSNorm the normalized input; the inputs of linear layers, one that several share counted once.
        norm = 4 * hidden + 8 if not self.is_llama else 4 * hidden * (2 if self.full else 1) + 4
        # The kernel's output is one of them, but Phi's has another order of its axes, and a copy is kept.
        inputs = inner + self.norms * hidden + (not (self.is_llama and self.card.has_varlen)) * self.width
        inputs *= product
        int8 = inputs if self.quantization == "int8" else 0  # kept by bitsandbytes itself, with checkpointing too
        kept, copied = self.norms * norm + (3 if self.is_llama else 1) * inner * product, 0
        if int8 or self.full or (self.rank and not self.masks):
            kept += inputs
        if self.rank:  # inputs of A after dropout, masks of dropout, inputs of B; copies in half precision of A and B
            kept += len(self.linear) * self.rank * product
            # Three layers have the input of another one, and share its mask.
            kept += self.masks * (sum(pair[0] for pair in self.linear) - 3 * hidden) * (product + 1)
            copied = 2 * cuda * self.rank * sum(map(sum, self.linear))
        if self.full:
            copied = 2 * cuda * sum(map(math.prod, self.linear))
        if self.card.has_varlen:  # query, output and sums of the softmax; key and value of each piece
            products = (len(layout.query_starts) - 1) * layout.longest[0] * layout.longest[1]  # of queries and keys
            attention = tokens * (2 * self.width * product + 4 * self.heads)
            attention += copies * len(layout.key_places) * self.width * 2 * product
        else:
            products = sum(each.places.numel() * each.places.shape[1] for each in layout.buckets)
            masks = sum(each.mask.numel() for each in layout.buckets if each.mask is not None)
            padded = sum(each.places.numel() for each in layout.buckets)
            attention = copies * (padded * 4 * (self.width * product + self.heads) + product * masks)
        layer, width = tokens * kept + attention + copied, tokens * (hidden + inner)
        peak = width * COUNTED["peaks"][self.kind][2 * self.is_llama + (not cuda)]
        if self.card.has_varlen:
            sums = 4 * self.heads * -(-self.width // self.heads // 32) * 32
            sums *= tokens + 128 * copies * (len(layout.query_starts) - 1)
            sums -= width * COUNTED["freed"][self.kind][self.is_llama]
            peak = max(peak, sums)
        if self.arguments.gradient_checkpointing:  # one layer is computed anew at a time: measured on an H100
            peak += layer
            layer = tokens * (hidden * stream + int8)
        features = vision.hidden_size * (2 * self.patches if cuda else 4 * self.tower_tokens)
        features += (len(self.projector_sizes) - 1) * 2 * self.patches * hidden * product
        activations = self.layers * layer + images * features + tokens * (norm + 2 * self.rotary * stream)

        # At the peak, beside the activations, with a frozen head: the logits of a chunk in float32 and as they are
        # multiplied, the hidden states and their gradient. With a trained one: three times the logits of a chunk in
        # float32, the gradients of hidden states in other chunks, the head's gradient and copy. Or that of the layers.
        head = self.vocabulary * hidden
        pixels = images * 3 * math.prod(image_size(vision))
        chunk = min(supervised, max(1, ClipPhiForCausalLM.max_logits // self.vocabulary))
        loss, states = 12 * chunk * self.vocabulary, hidden * product
        if not self.full:
            each = 6 * self.vocabulary + 2 * hidden if cuda else 4 * self.vocabulary + 12 * hidden
            loss = chunk * each + states * (tokens + supervised)
        elif supervised > chunk:
            bias = 0 if self.is_llama else 2 * head if cuda else 4 * chunk * self.vocabulary
            loss += states * (tokens + supervised - chunk) + head * (6 if cuda else 4) + bias
        else:
            gradient = 6 * head if cuda else 4 * (head + chunk * self.vocabulary) + states * (tokens + supervised)
            loss = max(loss + 2 * head * cuda, gradient)
        peak = max(loss, peak)
        # The tower has finished before the decoder begins: all its hidden states, and one layer's activations.
        tower = (vision.num_hidden_layers + 1) * vision.hidden_size * product
        tower = images * self.tower_tokens * (tower + 13.5 * vision.intermediate_size) + 2 * pixels * cuda
        tower = max(0.0, tower + tokens * hidden * stream - activations - peak - 4 * pixels)
        items = {"activations": activations, "loss or a layer, at its peak": peak, "pixels": 4 * pixels, "tower": tower}
        linear, patches = (weights(self.model.model.vision_tower, kind) for kind in (torch.nn.Linear, torch.nn.Conv2d))
        tower_flops = 2 * self.tower_tokens * sum(linear) + 2 * self.patches * sum([*patches, *self.projector_sizes])
        tower_flops += 4 * vision.num_hidden_layers * self.tower_tokens**2 * vision.hidden_size
        # A product in the forward pass, one for the input's gradient, one for a trained weight's. The backward pass of
        # attention is 2.5 times its forward pass.
        frozen, lora = (sum(f(*pair) for pair in self.linear) for f in (int.__mul__, int.__add__))
        lora *= self.rank
        layer_flops = tokens * ((6 if self.full else 4) * frozen + 6 * lora) + 14 * copies * products * self.width
        if self.arguments.gradient_checkpointing:  # all is computed again but the last product
            last = (self.rank or self.linear[-1][0]) * self.linear[-1][1]
            layer_flops += 2 * tokens * (frozen + lora - last) + 4 * copies * products * self.width
        times = 6 + 2 * (supervised > chunk) if self.full else 4  # a trained head's chunks are computed twice
        decoder = self.layers * layer_flops + supervised * head * times
        projector = 2 * images * self.patches * (2 * sum(self.projector_sizes) - self.projector_sizes[0])
        return items, images * tower_flops, decoder + projector


def weights(part: Any, kind: Any) -> list[int]:
    return [each.weight.numel() for each in part.modules() if isinstance(each, kind)]


def typical_sample(arguments: TrainingArguments, patches: int) -> tuple[list[int], int, int]:
    """An image of the stage's data: conversation_ids, supervised tokens, and captions or conversations."""
    captions = arguments.conversations_per_image or 1
    lengths = (CAPTION_LENGTHS * captions)[:captions]
    supervised = sum(lengths) + len(lengths)
    if isinstance(arguments, Stage2Arguments):
        lengths, supervised = CONVERSATION_LENGTHS, ANSWERS
    ids = [0] * patches + [number for number, size in enumerate(lengths, 1) for _ in range(size)]
    return ids, supervised, len(lengths)


def largest_pack(formula: Formula) -> int:
    """How many typical samples fit in a pack on the formula's card."""
    ids, supervised, _ = typical_sample(formula.arguments, formula.patches)
    pageable = formula.fixed_bytes()["optimizer"] if formula.arguments.optim.startswith("paged") else 0
    room = formula.card.memory * GIB + pageable
    return bisect.bisect(range(1, 2**24), room, key=lambda count: sum(formula.bill([ids], supervised, count).values()))


def fit_batches(
    arguments: TrainingArguments, model: Any, accelerator: Any, before: dict[str, Any] | None
) -> tuple[TrainingArguments, int]:
    """The options with tokens of a pack and accumulation decided, and the tokens that fit (0: not known).

    On CUDA auto is what the plan says, checked by a trial step. Accumulation follows the tokens of an optimizer step,
    so that a smaller card trains with smaller packs and the same steps. before: the run of the training checkpoint that
    is resumed, whose packs must stay. Raises ValueError if not even one sample fits."""
    budget, passes, fits = arguments.max_tokens_per_batch, arguments.gradient_accumulation_steps, 0
    total, world_size = arguments.tokens_per_optimizer_step, accelerator.num_processes
    is_cuda, has_size = accelerator.device.type == "cuda", "per_device_train_batch_size" in arguments.given
    if budget == "auto" and before and isinstance(before.get("max_tokens_per_batch"), int):
        budget, given = before["max_tokens_per_batch"], "gradient_accumulation_steps" in arguments.given
        passes = passes if given else max(1, before["batches_per_step"] // world_size)
    elif budget != "auto" or has_size or not is_cuda or is_sharded(accelerator):
        if budget == "auto":
            budget = 0 if has_size or not (is_cuda or arguments.packs) else USUAL_TOKENS
        if budget and "tokens_per_optimizer_step" in arguments.given:
            passes = -(-total // (budget * world_size))
    else:
        found = [tokens_that_fit(arguments, model, accelerator)]
        budget = fits = min(gather_object(found) if world_size > 1 else found)
        if "gradient_accumulation_steps" not in arguments.given:
            passes = -(-total // (fits * world_size))
            budget = min(fits, -(-total // (passes * world_size)) // 8 * 8)
    if not budget and "tokens_per_optimizer_step" in arguments.given:
        raise ValueError("--tokens_per_optimizer_step has no effect on batches of images: add --max_tokens_per_batch")
    return dataclasses.replace(arguments, max_tokens_per_batch=budget, gradient_accumulation_steps=passes), fits


def tokens_that_fit(arguments: TrainingArguments, model: Any, accelerator: Any) -> int:
    """The largest pack of typical samples that this GPU trains on. Raises ValueError if not one of them fits."""
    device, dtype = accelerator.device, model.model.language_model.dtype
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, dtype)
    attention = model.config.get_text_config()._attn_implementation
    free, total = torch.cuda.mem_get_info(device)
    room = (free + torch.cuda.memory_reserved(device) + CONTEXT[True]) / GIB
    has_varlen = attention != SDPA_PACKED_ATTENTION and has_varlen_kernel(device, dtype)
    name, precision = torch.cuda.get_device_name(device), str(dtype).removeprefix("torch.")
    card = Gpu(name, 0.0, memory=room, dtype=precision, has_varlen=has_varlen)
    try:
        formula = Formula(model.config, arguments, card)
        spare, number = formula.fixed_bytes()["optimizer"], largest_pack(formula)
        size = len(typical_sample(arguments, formula.patches)[0])
    except ValueError:  # no formula for this decoder
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        size, spare, number = 107, 8 * trained, USUAL_TOKENS // 107
    if accelerator.num_processes > 1:
        spare += sum(4 * each.numel() for each in model.parameters() if each.requires_grad)  # DDP's copies
    spare = 0 if arguments.optim.startswith("paged") else spare
    # A step of one optimizer update at most.
    number = min(number, -(-arguments.tokens_per_optimizer_step // size))
    fitting = fit_by_trial(number, lambda count: trial_step(arguments, model, accelerator, count, spare))
    if fitting == 0:
        ways = ["--gradient_checkpointing true", "--optim paged_adam8bit", "a larger GPU"]
        ways = ways[arguments.gradient_checkpointing :]
        if isinstance(arguments, Stage2Arguments) and arguments.quantization == "none":
            ways = ["--tune_decoder lora"] if arguments.tune_decoder == "full" else ["--quantization nf4", *ways]
        problem = f"not even one image with its texts ({size} tokens) fits on {name}"
        left = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free, with the model"
        raise ValueError(f"{problem} ({left}): try {', '.join(ways)}")
    return fitting * size


def fit_by_trial(number: int, fits: Callable[[int], bool]) -> int:
    """The largest of number, 0.85 of it, ... for which fits holds, or 0."""
    while number > 0 and not fits(number):
        number = int(0.85 * number)
    return number


def image_size(vision: Any) -> tuple[int, int]:
    """Height and width in a tower's config, 224 without any; its image processor may give other ones."""
    size = getattr(vision, "image_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def trial_step(arguments: TrainingArguments, model: Any, accelerator: Any, number: int, spare: int) -> bool:
    """Whether forward and backward pass of a pack of so many typical samples fit, beside spare bytes."""
    device, config, vision = accelerator.device, model.config, model.config.vision_config
    prefix = [config.image_token_id] * measure_tower(config, *image_size(vision))[0]
    ids, supervised, count = typical_sample(arguments, len(prefix))
    lengths, learnt = [ids.count(each) + 1 for each in range(1, count + 1)], supervised // count
    texts = [Encoded([0] * length, [-100] * (length - learnt) + [0] * min(learnt, length)) for length in lengths]
    sample = build_shared_prefix(texts, prefix, "trial")
    pack = None
    try:
        held = torch.empty(spare, dtype=torch.uint8, device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            pack = pack_samples([sample] * number, torch.zeros(number, 3, *image_size(vision)), 0).to(device)
            model.train()
            for _ in range(2):  # the second one beside the gradients of the first
                with accelerator.autocast():
                    loss = model(**pack.inputs, use_cache=False, num_items_in_batch=1).loss
                loss.backward()
        del held
    except torch.OutOfMemoryError:
        return False
    finally:
        del pack
        model.zero_grad()
        torch.cuda.empty_cache()
    return True


def fit_longest(model: Any, arguments: TrainingArguments, longest: int, fits: int, log: Callable[[str], Any]) -> None:
    """Recompute activations if the longest sample, a pack of its own, does not fit otherwise.

    longest: its tokens. fits: as of fit_batches. Raises ValueError if the options forbid it."""
    if not 0 < fits < longest or arguments.gradient_checkpointing:
        return
    if "gradient_checkpointing" in arguments.given:
        raise ValueError(f"the longest sample has {longest:,} tokens, and {fits:,} fit: --gradient_checkpointing true")
    log(f"the longest sample has {longest:,} tokens, and {fits:,} fit: --gradient_checkpointing is turned on")
    enable_checkpointing(model)


def enable_checkpointing(model: Any) -> None:
    """Recompute the decoder's activations in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()  # with an adapter, it keeps the tower's activations, too
