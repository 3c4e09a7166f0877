"""Pretrain the demo's two small backbones: `python examples/pretrain_demo_backbones.py --output FOLDER`.

vision/ is a CLIP model trained contrastively on drawn scenes: whole images against captions, and image patches
against phrases (as in RegionCLIP, arXiv 2112.09106). text/ is a Phi decoder trained on texts about such scenes. Most
texts follow "slots": noisy mixtures of word embeddings at the positions of the image's patches. The decoder learns to
answer from them as a large language model answers from its context, without any image. Short texts that name colors,
places and comparisons teach it to look objects up; then come conversations with many questions. Only compositions of
the train split are used.

With the default settings this takes about 45 minutes on two CPU cores, and a few minutes with --device cuda.
"""

import argparse
import functools
import itertools
import math
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # busy-waiting threads slow each other down on small machines

import numpy as np
import torch
from scene_scores import question_kind
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    GenerationConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from clip_phi.data import synthetic as drawn

END = "<|endoftext|>"
PATCH_SIZE = 16
GRID = drawn.IMAGE_SIZE // PATCH_SIZE
NUM_SLOTS = GRID * GRID
SPARE_ROWS = 16  # embeddings without a token, as in phi-2: Clip-Phi uses them for <image> and <pad>
COLORS, SHAPES = list(drawn.COLORS), list(drawn.SHAPES)
PLACES = ("left", "right", "above", "below")
NUM_BINS = 8
BASICS_SHARE = 0.25  # of the decoder's steps
BLIND_SHARE = 0.1  # of the decoder's steps
DECODER_SIZE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
                "partial_rotary_factor": 0.5}  # fmt: skip


@dataclass
class Grids:
    """The objects of a batch of scenes and their positions."""

    colors: torch.Tensor  # int64 (batch, MAX_OBJECTS): index into COLORS, -1 for an absent object
    shapes: torch.Tensor  # int64 (batch, MAX_OBJECTS): index into SHAPES, -1 for an absent object
    centres: torch.Tensor  # (batch, MAX_OBJECTS, 2): x, y in [0, 1]
    coverage: torch.Tensor  # (batch, MAX_OBJECTS, NUM_SLOTS): share of each patch that is inside the object's box

    def to(self, device: torch.device) -> "Grids":
        return Grids(*(value.to(device) for value in vars(self).values()))


def lay_out(scenes: Sequence[drawn.Scene]) -> Grids:
    shape = (len(scenes), drawn.MAX_OBJECTS)
    colors, shapes = np.full(shape, -1), np.full(shape, -1)
    centres, coverage = np.zeros((*shape, 2), np.float32), np.zeros((*shape, NUM_SLOTS), np.float32)
    edges = np.arange(GRID) * PATCH_SIZE
    for i, scene in enumerate(scenes):
        for j, item in enumerate(scene.objects):
            colors[i, j], shapes[i, j] = COLORS.index(item.color), SHAPES.index(item.shape)
            centres[i, j] = item.x / drawn.IMAGE_SIZE, item.y / drawn.IMAGE_SIZE
            across, down = (
                (np.minimum(edges + PATCH_SIZE, centre + item.radius) - np.maximum(edges, centre - item.radius)).clip(0)
                for centre in (item.x, item.y)
            )
            coverage[i, j] = (down[:, None] * across[None, :]).reshape(-1) / PATCH_SIZE**2
    return Grids(*(torch.from_numpy(array) for array in (colors, shapes, centres, coverage)))


def sample_scenes(rng: random.Random, number: int) -> list[drawn.Scene]:
    return [drawn.sample_scene(rng, "train") for _ in range(number)]


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Return the share of the peak learning rates: a linear warm-up, then a cosine to 2 %."""
    warmup = min(warmup, steps // 10 + 1)
    return min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


# ---------------------------------------------------------------------------------------------------- the optimizer


class Muon(torch.optim.Optimizer):
    """Orthogonal updates for the weights of linear layers; AdamW for embeddings, heads, norms and biases.

    Source: Muon, https://kellerjordan.github.io/posts/muon.

    Args:
        module: the model whose weights are trained.
        lr: peak learning rate of AdamW.
        matrix_lr: peak learning rate of the orthogonal updates.
        weight_decay: of all weights, at AdamW's learning rate.
    """

    def __init__(
        self, module: torch.nn.Module, lr: float = 1e-3, matrix_lr: float = 0.01, weight_decay: float = 0.05
    ) -> None:
        linear = {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
        matrices = [part.weight for name, part in linear.items() if not name.endswith("_head")]
        chosen = {id(weight) for weight in matrices}
        others = [weight for weight in module.parameters() if id(weight) not in chosen]
        self.adam = torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=weight_decay)
        shapes = sorted({weight.shape for weight in matrices})
        super().__init__([{"params": [w for w in matrices if w.shape == shape]} for shape in shapes], {})
        self.lr, self.matrix_lr, self.weight_decay = lr, matrix_lr, weight_decay

    @torch.no_grad()
    def step(self, scale: float) -> None:  # type: ignore[override]
        """Take a step. scale: of both learning rates."""
        for group in self.adam.param_groups:
            group["lr"] = scale * self.lr
        self.adam.step()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            gradient = torch.stack([weight.grad for weight in weights])
            average = group.setdefault("average", torch.zeros_like(gradient)).lerp_(gradient, 0.05)
            update = orthogonalize(gradient.lerp(average, 0.95))
            rows, columns = update.shape[-2:]
            torch._foreach_mul_(weights, 1 - scale * self.lr * self.weight_decay)
            step = scale * self.matrix_lr * max(1, rows / columns) ** 0.5
            torch._foreach_sub_(weights, list(step * update))

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad()
        self.adam.zero_grad()


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of float (..., rows, columns) near one, by five Newton-Schulz iterations."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if tall else matrices
    found = found / (found.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = found @ found.mT
        found = 3.4445 * found + (-4.7750 * gram + 2.0315 * gram @ gram) @ found
    return found.mT if tall else found


# ---------------------------------------------------------------------------------------------------- the tokenizer


Turns = list[tuple[str, str]]


def speech_turn(scene: drawn.Scene, rng: random.Random) -> tuple[str, str]:
    """Make a prompt with its question in the transcript, in any case and with or without the question mark."""
    question, answer = rng.choice(drawn.dialogue(scene, rng))
    spoken = rng.choice((question, question.lower(), question.lower().rstrip("?")))
    return f"Speech: {spoken}\nInstruct: Answer the question in the speech.\nOutput:", f" {answer}"


def exercise(scene: drawn.Scene, rng: random.Random) -> tuple[str, str]:
    """Make a dense text for pretraining only: colors by shape, places by name, and comparisons of places."""
    objects = rng.sample(scene.objects, len(scene.objects))  # shuffled, so that only shape and color identify a fact
    kind = rng.randrange(3 if len(objects) > 1 else 2)
    if kind == 0:
        return "Instruct: Name the colors.\nOutput:", f" {', '.join(f'{item.shape} {item.color}' for item in objects)}"
    if kind == 1:
        return "Instruct: Name the places.\nOutput:", f" {', '.join(f'{item.name} {place(item)}' for item in objects)}"
    comparisons = [
        f"{one.name} {other.name} {'left' if one.x < other.x else 'right'} {'above' if one.y < other.y else 'below'}"
        for one, other in itertools.permutations(objects, 2)
    ]
    return "Instruct: Compare the objects.\nOutput:", f" {', '.join(comparisons)}"


def place(item: drawn.DrawnObject) -> str:
    column, row = (centre * NUM_BINS // drawn.IMAGE_SIZE for centre in (item.x, item.y))
    return f"column {column} row {row}"


def ask_place(scene: drawn.Scene, rng: random.Random) -> tuple[str, str]:
    item = rng.choice(scene.objects)
    return f"Where is the {item.name}?", place(item)


def conversation_of(scene: drawn.Scene, rng: random.Random) -> Turns:
    """Make many turns about a scene, in any order: comparisons of places, the hardest kind, are the most frequent."""
    turns: dict[str, str] = {}
    for ask, times in QUESTIONS:
        for _ in range(times):
            if (turn := ask(scene, rng)) is not None:
                turns.setdefault(*turn)
    conversation = rng.sample(list(turns.items()), len(turns))
    if rng.random() < 0.4:  # last, since later answers could copy from it
        conversation.append(drawn.description(scene, rng))
    return [(f"Instruct: {question}\nOutput:", f" {answer}") for question, answer in conversation]


QUESTIONS = ((drawn.ask_relation, 5), (drawn.ask_color, 3), (drawn.ask_shape, 2), (drawn.ask_presence, 2),
             (drawn.ask_count, 1), (ask_place, 1))  # fmt: skip


def turns_of(scene: drawn.Scene, rng: random.Random, basics: bool = False) -> Turns:
    """Make (prompt, answer) pairs in the model's own format, in order.

    Args:
        scene: the scene of the texts.
        rng: the source of randomness.
        basics: only captions and exercises; from these short texts the decoder learns look-up fastest.
    """
    kind = rng.random() * (0.40 if basics else 1.0)
    if kind < 0.15:
        return [("", f" {rng.choice(drawn.captions(scene, rng))}")]
    if kind < 0.40:
        return [exercise(scene, rng)]
    if kind < 0.45:
        return [speech_turn(scene, rng)]
    return conversation_of(scene, rng)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    rng = random.Random(f"tokenizer {seed}")
    texts = ["".join(sum(turns_of(drawn.sample_scene(rng, "train"), rng), ())) for _ in range(3000)]
    texts += [" left right above below row column background"] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=4, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=512)


# -------------------------------------------------------------------------------------------------------- the tower


class Tower(torch.nn.Module):
    """The CLIP model, and a training head on its patches in place of the later projector."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        end = tokenizer.eos_token_id
        text = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
                "num_attention_heads": 4, "max_position_embeddings": 64, "projection_dim": 128,
                "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}  # fmt: skip
        vision = {"image_size": drawn.IMAGE_SIZE, "patch_size": PATCH_SIZE, "hidden_size": 128, "projection_dim": 128,
                  "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}  # fmt: skip
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
        self.patch_head = torch.nn.Linear(128, 128)
        self.patch_scale = torch.nn.Parameter(torch.tensor(2.5))
        self.tokenizer = tokenizer
        names = [f"a {color} {shape}" for color in COLORS for shape in SHAPES] + ["background"]
        bins = range(NUM_BINS)
        self.phrases = {"name": names, "color": COLORS, "shape": SHAPES, "side": ["left", "right"],
                        "height": ["above", "below"], "column": [f"column {number}" for number in bins],
                        "row": [f"row {number}" for number in bins]}  # fmt: skip

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        sequences = [[*self.tokenizer(text).input_ids, self.tokenizer.eos_token_id] for text in texts]
        longest = max(len(ids) for ids in sequences)
        ids = torch.tensor([ids + [self.tokenizer.eos_token_id] * (longest - len(ids)) for ids in sequences])
        ids = ids.to(self.clip.device)
        return F.normalize(self.clip.get_text_features(input_ids=ids).pooler_output, dim=-1)

    def encode_images(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode uint8 pixels (batch, height, width, 3) to features (batch, 128) and (batch, patches, 128)."""
        outputs = self.clip.get_image_features(pixel_values=self.normalize(pixels), output_hidden_states=True)
        return F.normalize(outputs.pooler_output, dim=-1), outputs.hidden_states[-2][:, 1:]

    def normalize(self, pixels: np.ndarray) -> torch.Tensor:
        processor = CLIPImageProcessorPil()
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        return ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2).to(self.clip.device)

    def patch_logits(self, patches: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare each patch with each phrase. Returns (batch, patches, phrases in the group) for each group."""
        embeds = self.encode_texts([phrase for group in self.phrases.values() for phrase in group])
        logits = self.patch_scale.exp() * F.normalize(self.patch_head(patches), dim=-1) @ embeds.T
        return dict(zip(self.phrases, logits.split([len(g) for g in self.phrases.values()], dim=-1), strict=True))


def contrastive_loss(logits: torch.Tensor, scenes: Sequence[drawn.Scene]) -> torch.Tensor:
    """Compute CLIP's loss with scenes of equal composition as positives of each other."""
    keys: dict[tuple[tuple[str, str], ...], int] = {}
    numbers = torch.tensor([keys.setdefault(tuple(sorted(s.composition.elements())), len(keys)) for s in scenes])
    numbers = numbers.to(logits.device)
    target = (numbers[:, None] == numbers).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def region_losses(logits: dict[str, torch.Tensor], grids: Grids) -> dict[str, torch.Tensor]:
    """Compute the losses of each patch's object and its position. Patches without an object show background."""
    coverage, owner = grids.coverage.max(dim=1)  # each (batch, patches)
    shown, empty = coverage > 0.15, coverage == 0
    colors, shapes = grids.colors.gather(1, owner)[shown], grids.shapes.gather(1, owner)[shown]
    x, y = (grids.centres[..., axis].gather(1, owner)[shown] for axis in (0, 1))
    names = torch.full_like(owner, -100).masked_fill(empty, len(COLORS) * len(SHAPES))
    names[shown] = colors * len(SHAPES) + shapes
    losses = {"name": F.cross_entropy(logits["name"].flatten(0, 1), names.flatten())}
    for group, target in (("color", colors), ("shape", shapes), ("column", (x * NUM_BINS).long()),
                          ("row", (y * NUM_BINS).long()), ("side", torch.stack((1 - x, x), -1)),
                          ("height", torch.stack((1 - y, y), -1))):  # fmt: skip
        losses[group] = F.cross_entropy(logits[group][shown], target)
    return losses


def train_tower(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, device: str = "cpu",
                batch_size: int = 192) -> CLIPModel:  # fmt: skip
    torch.manual_seed(seed)
    rng = random.Random(f"tower {seed}")
    tower = Tower(tokenizer).to(device)
    optimizer = Muon(tower)
    pool = [drawn.sample_scene(rng, "train") for _ in range(min(40_000, steps * batch_size))]
    pixels = np.stack([np.asarray(drawn.draw_scene(scene)) for scene in pool])
    started = time.time()
    for step in range(steps):
        chosen = [rng.randrange(len(pool)) for _ in range(batch_size)]
        scenes = [pool[index] for index in chosen]
        image_embeds, patches = tower.encode_images(pixels[chosen])
        text_embeds = tower.encode_texts([rng.choice(drawn.captions(scene, rng)) for scene in scenes])
        whole = contrastive_loss(tower.clip.logit_scale.exp().clamp(max=100) * image_embeds @ text_embeds.T, scenes)
        regions = region_losses(tower.patch_logits(patches), lay_out(scenes).to(tower.clip.device))
        loss = whole + torch.stack(list(regions.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step(learning_rate(step, steps))
        if step % 50 == 49 or step == steps - 1:
            detail = " ".join(f"{name} {value.item():.2f}" for name, value in regions.items())
            print(
                f"tower {step + 1}/{steps} ({time.time() - started:.0f} s): whole {whole.item():.2f} {detail}",
                flush=True,
            )
    evaluate_tower(tower.eval(), random.Random(f"tower evaluation {seed}"))
    return tower.clip.cpu()


@torch.no_grad()
def evaluate_tower(tower: Tower, rng: random.Random, num_scenes: int = 512) -> dict[str, float]:
    """Measure, on unseen compositions, retrieval of an image's caption among 64 and linear reading of each patch."""
    scenes = [drawn.sample_scene(rng, "val") for _ in range(num_scenes)]
    image_embeds, patches = tower.encode_images(np.stack([np.asarray(drawn.draw_scene(scene)) for scene in scenes]))
    text_embeds = tower.encode_texts([drawn.captions(scene, rng)[2] for scene in scenes])
    right = []
    for start in range(0, num_scenes, 64):
        found = (image_embeds[start : start + 64] @ text_embeds[start : start + 64].T).argmax(1).tolist()
        right += [scenes[start + f].composition == scenes[start + i].composition for i, f in enumerate(found)]
    grids = lay_out(scenes).to(tower.clip.device)
    coverage, owner = grids.coverage.max(dim=1)
    shown = coverage > 0.3
    logits = tower.patch_logits(patches)
    accuracy = {"caption among 64": sum(right) / len(right)}
    for group, truth in (("color", grids.colors), ("shape", grids.shapes)):
        accuracy[f"patch {group}"] = (logits[group].argmax(-1) == truth.gather(1, owner))[shown].float().mean().item()
    for group, axis in (("column", 0), ("row", 1)):
        truth = (grids.centres[..., axis] * NUM_BINS).long().gather(1, owner)
        accuracy[f"patch {group} +-1"] = ((logits[group].argmax(-1) - truth).abs() <= 1)[shown].float().mean().item()
    print(
        "tower, unseen compositions:", ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items()), flush=True
    )
    return accuracy


# ------------------------------------------------------------------------------------------------------ the decoder


@dataclass
class Texts:
    """A batch for the decoder: the objects, token ids and labels (-100 where unsupervised), right padded."""

    grids: Grids
    input_ids: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Texts":
        return Texts(self.grids.to(device), self.input_ids.to(device), self.labels.to(device))


class TextBatches:
    """The decoder's texts. The batch of a step depends on the seed and the step alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, steps: int, batch_size: int, seed: int) -> None:
        self.tokenizer, self.steps, self.batch_size, self.seed = tokenizer, steps, batch_size, seed
        self.encode = functools.lru_cache(100_000)(lambda text: tokenizer(text).input_ids)

    def __getitem__(self, step: int) -> tuple[bool, Texts]:
        """Make the texts of a step: (whether they follow slots, texts)."""
        rng = random.Random(f"texts {self.seed} {step}")
        blind = rng.random() < BLIND_SHARE  # without slots the whole text is supervised, with slots the answers
        basics = step < BASICS_SHARE * self.steps
        # of four times as many scenes those with texts of similar length: less padding
        size = self.batch_size * (2 if basics else 1)
        pairs = [(scene, turns_of(scene, rng, basics)) for scene in sample_scenes(rng, 4 * size)]
        pairs.sort(key=lambda pair: sum(len(prompt) + len(answer) for prompt, answer in pair[1]))
        start = rng.randrange(4) * size
        return not blind, self.tokenize(pairs[start : start + size], not blind)

    def tokenize(self, pairs: Sequence[tuple[drawn.Scene, Turns]], answers_only: bool) -> Texts:
        end = self.tokenizer.eos_token_id
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        for _, turns in pairs:
            ids.append([])
            labels.append([])
            for prompt, answer in turns:
                question, reply = self.encode(prompt), [*self.encode(answer), end]
                ids[-1] += question + reply
                labels[-1] += ([-100] * len(question) if answers_only else question) + reply
        longest = max(map(len, ids))
        return Texts(
            lay_out([scene for scene, _ in pairs]),
            torch.tensor([each + [end] * (longest - len(each)) for each in ids]),
            torch.tensor([each + [-100] * (longest - len(each)) for each in labels]),
        )


def make_slots(grids: Grids, embedding: torch.Tensor, words: Sequence[int], generator: torch.Generator,
               noise: float = 1.0) -> torch.Tensor:  # fmt: skip
    """Make noisy features at the positions of the patches: float (batch, NUM_SLOTS, hidden).

    Each slot mixes the embeddings of the words for its objects (color, shape, place), weighted by the share of the slot
    that each object covers. A linear projection of a tower's features replaces the slots later. So everything that a
    projection does not determine varies: scale, offset, noise, the share of each attribute, leaks between objects and
    lost attributes. words: ids of COLORS, SHAPES, PLACES and "background". noise: 0 to 1.
    """
    device = embedding.device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    batch, num_objects, _ = grids.coverage.shape
    # at equal length: embeddings of frequent words are longer, and would dominate the mixture
    chosen = embedding[torch.tensor(words, device=device)]
    vectors = F.normalize(chosen, dim=-1) * chosen.detach().norm(dim=-1).mean()
    hidden = vectors.shape[-1]
    present = (grids.colors >= 0).float()[..., None]
    colors = F.one_hot(grids.colors.clamp(min=0), len(COLORS)).float()
    shapes = F.one_hot(grids.shapes.clamp(min=0), len(SHAPES)).float()
    x, y = grids.centres.unbind(-1)
    places = torch.stack((1 - 2 * x, 2 * x - 1, 1 - 2 * y, 2 * y - 1), -1)
    # (batch, slots, objects): the weight of each object in a slot
    share = (grids.coverage * uniform(batch, 1, 1, low=1, high=4)).clamp(0, 1).transpose(1, 2)
    share = share ** uniform(batch, 1, 1, low=0.3, high=1.5)
    share = share * (share / share.amax(-1, keepdim=True).clamp(min=1e-6)) ** uniform(batch, 1, 1, high=3)
    facts = []
    for attribute, error in ((colors, 0.1), (shapes, 0.2), (places, 0.1)):
        number = attribute.shape[-1]
        confusion = noise * 0.25 * uniform(batch, 1, 1) * uniform(batch, num_objects, number)
        lost = uniform(batch, NUM_SLOTS, num_objects) < noise * 0.12 * uniform(batch, 1, 1)
        gain = torch.exp(0.2 * noise * normal(batch, 1, 1)) * (1 + 0.1 * noise * normal(batch, NUM_SLOTS, num_objects))
        weights = share * gain * ~lost
        mixed = weights @ (attribute + confusion * present)
        facts.append(mixed + noise * error * weights.sum(-1, keepdim=True) * normal(batch, NUM_SLOTS, number))
    empty = (1 - share.sum(-1, keepdim=True)).clamp(min=0) * uniform(batch, 1, 1)
    slots = torch.cat((*facts, empty), -1) @ vectors
    size = vectors.detach().pow(2).mean().sqrt()
    slots = slots + size * noise * (
        0.4 * uniform(batch, 1, 1) * normal(batch, NUM_SLOTS, hidden)
        + 0.35 * uniform(batch, 1, 1) * normal(batch, 1, hidden)
    )
    return slots * torch.exp(0.25 * noise * normal(batch, 1, 1))


def decoder_logits(
    decoder: PhiForCausalLM, slots: torch.Tensor | None, texts: Texts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits and their labels, at supervised positions only."""
    embeds = decoder.get_input_embeddings()(texts.input_ids)
    num_slots = 0 if slots is None else slots.shape[1]
    labels = F.pad(texts.labels, (num_slots, 0), value=-100)[:, 1:]
    hidden = decoder.model(inputs_embeds=embeds if slots is None else torch.cat((slots, embeds), 1), use_cache=False)
    supervised = labels != -100
    return decoder.lm_head(hidden.last_hidden_state[:, :-1][supervised]), labels[supervised]


def train_decoder(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, device: str = "cpu",
                  batch_size: int = 48) -> PhiForCausalLM:  # fmt: skip
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    end = tokenizer.eos_token_id
    config = PhiConfig(
        vocab_size=len(tokenizer) + SPARE_ROWS, max_position_embeddings=512, resid_pdrop=0.0,
        hidden_act="gelu_pytorch_tanh",  # equals phi-2's gelu_new up to rounding, four times as fast
        bos_token_id=end, eos_token_id=end, pad_token_id=None, tie_word_embeddings=False, **DECODER_SIZE,
    )  # fmt: skip
    decoder = PhiForCausalLM(config).to(device)
    words = [tokenizer(f" {word}").input_ids[-1] for word in (*COLORS, *SHAPES, *PLACES, "background")]
    optimizer = Muon(decoder)
    batches = TextBatches(tokenizer, steps, batch_size, seed)
    started = time.time()
    running: list[torch.Tensor] = []
    for step in range(steps):
        with_slots, texts = batches[step]
        texts = texts.to(decoder.device)
        embedding = decoder.get_input_embeddings().weight
        noise = min(1.0, max(0.0, 3 * step / steps - 1))  # clean slots first
        slots = make_slots(texts.grids, embedding, words, generator, noise) if with_slots else None
        loss = F.cross_entropy(*decoder_logits(decoder, slots, texts))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step(learning_rate(step, steps))
        if with_slots:
            running.append(loss.detach())
        if step % 100 == 99 or step == steps - 1:
            average = torch.stack(running[-50:]).mean().item()
            print(f"decoder {step + 1}/{steps} ({time.time() - started:.0f} s): loss {average:.3f}", flush=True)
        if step % 200 == 199 or step == steps - 1:
            evaluate_decoder(decoder.eval(), batches, words)
            decoder.train()
    decoder.config.resid_pdrop, decoder.config.hidden_act = 0.1, "gelu_new"  # as in phi-2's config
    return decoder.eval().cpu()


@torch.no_grad()
def evaluate_decoder(decoder: PhiForCausalLM, batches: TextBatches, words: Sequence[int],
                     num_scenes: int = 192) -> dict[str, float]:  # fmt: skip
    """Measure the share of exactly right answers on unseen compositions, from slots with all of the noise."""
    rng, device = random.Random("decoder evaluation"), decoder.device
    generator = torch.Generator(device).manual_seed(0)
    scenes = [drawn.sample_scene(rng, "val") for _ in range(num_scenes)]
    pairs = [(s, [(f"Instruct: {q}\nOutput:", f" {a}") for q, a in drawn.dialogue(s, rng)]) for s in scenes]
    texts = batches.tokenize(pairs, answers_only=True).to(device)
    slots = make_slots(texts.grids, decoder.get_input_embeddings().weight, words, generator)
    logits, labels = decoder_logits(decoder, slots, texts)
    tokens = iter((logits.argmax(-1) == labels).tolist())
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for prompt, answer in (turn for _, conversation in pairs for turn in conversation):
        correct = min([next(tokens) for _ in range(len(batches.encode(answer)) + 1)])
        kind = question_kind(prompt.removeprefix("Instruct: "))
        right[kind] += correct
        asked[kind] += 1
    accuracy = {kind: right[kind] / asked[kind] for kind in sorted(asked)} | {"all": right.total() / asked.total()}
    detail = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
    print(f"decoder, unseen compositions: {detail}", flush=True)
    return accuracy


# ----------------------------------------------------------------------------------------------------------- saving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for vision/ and text/")
    parser.add_argument(
        "--tower_steps", type=int, default=1500, help="training steps of 192 images (default: %(default)s)"
    )
    parser.add_argument(
        "--decoder_steps", type=int, default=3000, help="training steps of 48 texts (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights, the scenes and their texts (default: %(default)s)"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("vision", "text"),
        default=("vision", "text"),
        help="backbones to make (default: both)",
    )
    parser.add_argument("--num_threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device of the training: cpu or cuda (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    tokenizer = train_tokenizer(options.seed)
    print(f"tokenizer: {len(tokenizer)} entries", flush=True)
    if "vision" in options.parts:
        clip = train_tower(tokenizer, options.tower_steps, options.seed, options.device).half()
        clip.save_pretrained(options.output / "vision")
        tokenizer.save_pretrained(options.output / "vision")
        size = drawn.IMAGE_SIZE
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        processor.save_pretrained(options.output / "vision")
    if "text" in options.parts:
        decoder = train_decoder(tokenizer, options.decoder_steps, options.seed, options.device).half()
        decoder.generation_config = GenerationConfig(
            bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id
        )
        decoder.save_pretrained(options.output / "text", max_shard_size="1500KB")
        tokenizer.save_pretrained(options.output / "text")


if __name__ == "__main__":
    main()
