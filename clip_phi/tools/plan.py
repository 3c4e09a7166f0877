"""What a run needs, before a GPU is rented: parameters, FLOPs, memory by item, the largest batch, hours.

A formula over the shapes of the model. benchmarks/plan_counting.py counts the same tensor by tensor, and
tests/test_plan.py compares the two. What cannot be counted is assumed, and marked as such.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import torch

from modeling_clip_phi import ClipPhiConfig, ClipPhiForCausalLM

from ..batching.attention import make_pack_layout
from ..environment import GPUS, Gpu
from ..training.arguments import Stage2Arguments, TrainingArguments

GIB = 2**30
CPU = Gpu("cpu", 0.1, "cpu-16", "CPU, 16 GB", 16e9 / GIB, "float32", has_varlen=False)  # assumed peak, of one core
CARDS = {gpu.key: gpu for gpu in (*GPUS, CPU) if gpu.key}
# Bytes that a process takes before it has a tensor, and what the allocator holds beyond the tensors of a step, as a
# share of them: on CUDA assumed; on a CPU measured (docs/true_size.md).
CONTEXT, RESERVE = {True: int(0.6 * GIB), False: int(0.65 * GIB)}, {True: 0.05, False: 0.0}
CAPTION_LENGTHS = (11, 12, 12, 11, 12)  # 11.6 tokens of phi-2's tokenizer; the end token is no input
IMAGES, CONVERSATIONS = 118_287, 157_712  # of COCO train2017; of LLaVA-Instruct-150K
# The decoder layers that the formula knows, by their linear layers and number of norms.
PHI = ({"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}, 1)
LLAMA = ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 2)
# Most memory beside the activations in the decoder's forward and backward pass, in bytes for each token and unit of
# hidden + intermediate width: (Phi on CUDA, on a CPU, Llama on CUDA, on a CPU), counted on phi-2 and TinyLlama.
PEAKS = {"frozen": (3.2, 6.4, 7.33, 15.7), "lora": (9.6, 6.4, 8.93, 10.7), "full": (2.0, 4.0, 5.3, 12.8)}
PEAKS |= {"nf4": (8.4, 6.4, 8.93, 10.7), "int8": (7.2, 5.58, 6.93, 10.7)}
# The same with gradient checkpointing, for Phi, with the activations of one layer. These are upper bounds: the counting
# holds what a layer makes anew for longer than a GPU does. For Llama 1.5 times a layer's activations are assumed.
CHECKPOINTED_PEAKS = {"frozen": (10.07, 16.09), "lora": (55.5, 70.2), "full": (20.2, 20.0)}
CHECKPOINTED_PEAKS |= {"nf4": (57.1, 70.2), "int8": (67.5, 80.6)}


class Formula:
    """Memory and FLOPs of training a model on a card.

    Raises ValueError if the decoder's layers are neither like Phi's nor like Llama's."""

    def __init__(self, config: Any, arguments: TrainingArguments, card: Gpu):
        with torch.device("meta"):
            self.model = model = ClipPhiForCausalLM(config)
        self.arguments, self.card, self.is_cuda = arguments, card, card.dtype != "float32"
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
        self.patches = (self.vision.image_size // self.vision.patch_size) ** 2
        self.tower_tokens = self.patches + (config.vision_feature_select_strategy == "default")
        self.projector_sizes = weights(model.model.projector, torch.nn.Linear)
        stage2 = arguments if isinstance(arguments, Stage2Arguments) else None
        self.full = stage2 is not None and stage2.tune_decoder == "full"
        self.rank = stage2.lora_r if stage2 is not None and not self.full else 0
        self.masks = int(stage2 is not None and stage2.lora_dropout > 0)
        self.quantization = stage2.quantization if stage2 is not None else "none"
        self.kind = "frozen" if stage2 is None else "full" if self.full else self.quantization.replace("none", "lora")
        parts = [model.model.projector, *([model.model.language_model, model.lm_head] if self.full else [])]
        lora = [self.rank * size for pair in self.linear for size in pair] * self.layers if self.rank else []
        self.trained = [*{id(each): each.numel() for part in parts for each in part.parameters()}.values(), *lora]
        self.parameters = sum(each.numel() for each in model.parameters()) + sum(lora)

    def bill(self, conversation_ids: Sequence[Sequence[int]], supervised: int, copies: int = 1) -> dict[str, int]:
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

    def step(
        self, conversation_ids: Sequence[Sequence[int]], supervised: int, copies: int = 1
    ) -> tuple[dict[str, float], float, float]:
        """A step on a pack: its memory in bytes by item, FLOPs of tower and projector, and all other FLOPs.

        conversation_ids: of each sample and token, as in make_pack_layout. supervised: tokens with a label in all of
        them. copies: how often they are in the pack."""
        layout, supervised = make_pack_layout(conversation_ids), copies * supervised
        tokens, images = copies * sum(map(len, conversation_ids)), copies * sum(0 in ids for ids in conversation_ids)
        hidden, inner, cuda, vision = self.hidden, self.inner, self.is_cuda, self.vision
        # Bytes of a number in a product, a linear layer's output, the embeddings and the residual stream. A quantized
        # layer's output has its input's dtype, and under autocast a LayerNorm's is float32.
        product = 2 if cuda else 4
        output = product if self.is_llama or self.quantization == "none" else 4
        embedding, stream = (4 if self.full else product), (4 if self.full else output)
        # Kept for the backward pass, in bytes for each token: of a norm the input in float32 and statistics, and of a
        # trained RMSNorm the normalized input; the inputs of linear layers, one that several share counted once.
        norm = 4 * hidden + 8 if not self.is_llama else 4 * hidden * (2 if self.full else 1) + 4
        inputs = inner * output + self.norms * hidden * (output if self.is_llama else 4)
        if not (self.is_llama and self.card.has_varlen):
            inputs += self.width * (output if self.card.has_varlen else product)
        int8 = inputs if self.quantization == "int8" else 0  # kept by bitsandbytes itself, with checkpointing too
        kept, copied = int8 + self.norms * norm + (3 if self.is_llama else 1) * inner * output, 0
        if self.rank:  # inputs of A after dropout, masks of dropout, inputs of B; copies in half precision of A and B
            kept += (
                sum(pair[0] for pair in self.linear) * (product + self.masks) + len(self.linear) * self.rank * product
            )
            copied = 2 * cuda * self.rank * sum(map(sum, self.linear))
        if self.full:
            kept += sum(pair[0] for pair in self.linear) * product if cuda else inputs
            copied = 2 * cuda * sum(inputs * outputs for inputs, outputs in self.linear)
        if self.card.has_varlen:  # query, output and sums of the softmax; key and value of each piece
            products = (len(layout.query_starts) - 1) * layout.longest[0] * layout.longest[1]  # of queries and keys
            attention = tokens * (2 * self.width * max(output, stream) + 4 * self.heads)
            attention += copies * len(layout.key_places) * self.width * (max(output, stream) + output)
        else:
            products = sum(each.places.numel() * each.places.shape[1] for each in layout.buckets)
            masks = sum(each.mask.numel() for each in layout.buckets if each.mask is not None)
            padded = sum(each.places.numel() for each in layout.buckets)
            attention = copies * (padded * 4 * (self.width * product + self.heads) + product * masks)
        layer, width = tokens * kept + attention + copied, tokens * (hidden + inner)
        peak = width * PEAKS[self.kind][2 * self.is_llama + (not cuda)]
        if self.arguments.gradient_checkpointing:
            again = 1.5 * layer + peak if self.is_llama else width * CHECKPOINTED_PEAKS[self.kind][not cuda]
            peak = min(again, self.layers * layer + peak)
            layer = tokens * (hidden * stream + int8)
        features = vision.hidden_size * (2 * self.patches if cuda else 4 * self.tower_tokens)
        features += (len(self.projector_sizes) - 1) * 2 * self.patches * hidden * product
        activations = self.layers * layer + images * features + tokens * (norm + 2 * self.rotary * embedding)
        if self.arguments.gradient_checkpointing:
            activations -= tokens * hidden * (stream - embedding)  # the first layer's input

        # At the peak, beside the activations, with a frozen head: the logits of a chunk in float32 and as they are
        # multiplied, the hidden states and their gradient. With a trained one: three times the logits of a chunk in
        # float32, the gradients of hidden states in other chunks, the head's gradient and copy. Or that of the layers.
        head = self.vocabulary * hidden
        pixels = images * 3 * vision.image_size**2
        chunk = min(supervised, max(1, ClipPhiForCausalLM.max_logits // self.vocabulary))
        loss, states = 12 * chunk * self.vocabulary, hidden * (stream if self.is_llama else 4)
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
        tower = max(0.0, tower + tokens * hidden * embedding - activations - peak - 4 * pixels)
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


def make_plan(arguments: TrainingArguments, card: Gpu, mfu: float, config: ClipPhiConfig) -> dict[str, Any]:
    """For json: parameters, FLOPs per sample (a caption or a conversation), memory by item, largest batch, hours.

    The bill is that of the largest batch that fits, or of one image. mfu: assumed share of the peak. The states of a
    paged optimizer are in the bill, but may leave the card while a step needs the room."""
    formula = Formula(config, arguments, card)
    lengths: tuple[int, ...] = (165, 165)  # assumed: two conversations of an image in LLaVA-Instruct-150K,
    supervised, epoch = 250, CONVERSATIONS  # of which 125 tokens each are answers
    if not isinstance(arguments, Stage2Arguments):
        lengths = (CAPTION_LENGTHS * (arguments.conversations_per_image or 1))[: arguments.conversations_per_image]
        supervised, epoch = sum(lengths) + len(lengths), IMAGES * len(lengths)
    ids = [0] * formula.patches + [number for number, size in enumerate(lengths, 1) for _ in range(size)]
    pageable = formula.fixed_bytes()["optimizer"] if arguments.optim.startswith("paged") else 0
    room, copies = card.memory * GIB + pageable, range(1, 2**24)
    low = bisect.bisect(copies, room, key=lambda number: sum(formula.bill([ids], supervised, number).values()))
    (less, *flops), (more, *_) = (formula.step([ids], supervised, number) for number in (1000, 2000))
    tower, rest = (each / 1000 / len(lengths) for each in flops)
    samples_per_second = mfu * card.tflops * 1e12 / (tower + rest)
    return {
        "gpu": card.title,
        "stage": arguments.stage,
        "parameters": formula.parameters,
        "trainable_parameters": sum(formula.trained),
        "flops_per_sample": tower + rest,
        "tower_flops_per_sample": tower,
        "activation_bytes_per_token": (more["activations"] - less["activations"]) / 1000 / len(ids),
        "memory_bytes": int(card.memory * GIB),
        "bill_bytes": formula.bill([ids], supervised, max(low, 1)),
        "pageable_bytes": pageable,
        "fits": low > 0,
        "images_per_step": low,
        "max_tokens_per_batch": low * len(ids),
        "tokens_per_image": len(ids),
        "assumed_mfu": mfu,
        "samples_per_second": samples_per_second,
        "samples_per_epoch": epoch,
        "hours_per_epoch": epoch / samples_per_second / 3600,
    }


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as a table."""
    bill, memory, rate = plan["bill_bytes"], plan["memory_bytes"] / GIB, plan["samples_per_second"]
    rows = [*bill.items(), ("together", sum(bill.values()))]
    lines = [
        f"{plan['gpu']}, stage {plan['stage']}",
        f"  parameters            {plan['parameters']:,}, of which {plan['trainable_parameters']:,} are trained",
        f"  FLOPs per sample      {plan['flops_per_sample'] / 1e9:,.0f} G",
        f"  kept per token        {plan['activation_bytes_per_token'] / 1e6:.2f} MB for the backward pass",
        *(f"  {name:<30}{size / GIB:8.2f} GiB" for name, size in rows),
    ]
    lines[-1] += f" of {memory:.2f}"
    if plan["pageable_bytes"]:
        lines.append("  of which the optimizer may leave the card while a step needs the room")
    fits = f"  largest --max_tokens_per_batch   {plan['max_tokens_per_batch']:,} ({plan['images_per_step']:,} images)"
    lines.append(fits if plan["fits"] else "  Not even one image fits: try --gradient_checkpointing, or a larger card")
    rate = f"{rate:,.{0 if rate >= 10 else 2}f} samples/s, {plan['hours_per_epoch']:.2f} hours for an epoch of"
    lines.append(f"  at {plan['assumed_mfu']:.0%} of its peak        {rate} {plan['samples_per_epoch']:,}")
    return "\n".join(lines)
