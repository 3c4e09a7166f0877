"""Pretrain the demo's two small backbones: `python examples/pretrain_demo_backbones.py --output FOLDER`.

vision/ is a CLIP model trained contrastively on drawn scenes: whole images against captions, and image patches
against phrases (as in RegionCLIP, arXiv 2112.09106). text/ is a Phi decoder trained on texts about such scenes. Most
texts follow "slots": noisy mixtures of word embeddings at the positions of the image's patches. The decoder learns to
answer from them as a large language model answers from its context, without any image. Only compositions of the train
split are used.
"""

import argparse
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


@dataclass
class Grids:
    """The objects of a batch of scenes and their positions."""

    colors: torch.Tensor  # int64 (batch, MAX_OBJECTS): index into COLORS, -1 for an absent object
    shapes: torch.Tensor  # int64 (batch, MAX_OBJECTS): index into SHAPES, -1 for an absent object
    centres: torch.Tensor  # (batch, MAX_OBJECTS, 2): x, y in [0, 1]
    coverage: torch.Tensor  # (batch, MAX_OBJECTS, NUM_SLOTS): share of each patch that is inside the object's box


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


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    warmup = min(warmup, steps // 10 + 1)
    return peak * min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


# ---------------------------------------------------------------------------------------------------- the tokenizer


def speech_turn(scene: drawn.Scene, rng: random.Random) -> tuple[str, str]:
    """Make a prompt with its question in the transcript, in any case and with or without the question mark."""
    question, answer = rng.choice(drawn.dialogue(scene, rng))
    spoken = rng.choice((question, question.lower(), question.lower().rstrip("?")))
    return f"Speech: {spoken}\nInstruct: Answer the question in the speech.\nOutput:", f" {answer}"


def exercise(scene: drawn.Scene, rng: random.Random) -> tuple[str, str]:
    """Make a dense text for pretraining only. Captions train look-up by color; these, by shape and position."""
    objects = rng.sample(scene.objects, len(scene.objects))  # shuffled, so that only shape and color identify a fact
    kind = rng.randrange(3 if len(objects) > 1 else 2)
    if kind == 0:
        return "Instruct: Name the colors.\nOutput:", f" {', '.join(f'{item.shape} {item.color}' for item in objects)}"
    if kind == 1:
        cells = [[centre * NUM_BINS // drawn.IMAGE_SIZE for centre in (item.x, item.y)] for item in objects]
        places = [f"{item.name} column {x} row {y}" for item, (x, y) in zip(objects, cells, strict=True)]
        return "Instruct: Name the places.\nOutput:", f" {', '.join(places)}"
    comparisons = [
        f"{one.name} {other.name} {'left' if one.x < other.x else 'right'} {'above' if one.y < other.y else 'below'}"
        for one, other in itertools.permutations(objects, 2)
    ]
    return "Instruct: Compare the objects.\nOutput:", f" {', '.join(comparisons)}"


def turns_of(scene: drawn.Scene, rng: random.Random, basics: bool = False) -> list[tuple[str, str]]:
    """Make (prompt, answer) pairs in the model's own format, in order.

    Args:
        scene: the scene of the texts.
        rng: the source of randomness.
        basics: only captions and exercises; from these short texts the decoder learns look-up fastest.
    """
    kind = rng.random() * (0.38 if basics else 1.0)
    if kind < 0.22:
        return [("", f" {rng.choice(drawn.captions(scene, rng))}")]
    if kind < 0.38:
        return [exercise(scene, rng)]
    if kind < 0.45:
        return [speech_turn(scene, rng)]
    turns = dict(drawn.dialogue(scene, rng) + drawn.dialogue(scene, rng))
    for ask in (drawn.ask_relation, drawn.ask_color, drawn.ask_color):
        turns.update([ask(scene, rng) or drawn.dialogue(scene, rng)[0]])  # the hardest kinds are more frequent
    conversation = rng.sample(list(turns.items()), len(turns))
    if rng.random() < 0.4:  # last, since later answers could copy from it
        conversation.append(drawn.description(scene, rng))
    return [(f"Instruct: {question}\nOutput:", f" {answer}") for question, answer in conversation]


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
        return F.normalize(self.clip.get_text_features(input_ids=ids).pooler_output, dim=-1)

    def encode_images(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode uint8 pixels (batch, height, width, 3) to features (batch, 128) and (batch, patches, 128)."""
        outputs = self.clip.get_image_features(pixel_values=normalize(pixels), output_hidden_states=True)
        return F.normalize(outputs.pooler_output, dim=-1), outputs.hidden_states[-2][:, 1:]

    def patch_logits(self, patches: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare each patch with each phrase. Returns (batch, patches, phrases in the group) for each group."""
        embeds = self.encode_texts([phrase for group in self.phrases.values() for phrase in group])
        logits = self.patch_scale.exp() * F.normalize(self.patch_head(patches), dim=-1) @ embeds.T
        return dict(zip(self.phrases, logits.split([len(g) for g in self.phrases.values()], dim=-1), strict=True))


def normalize(pixels: np.ndarray) -> torch.Tensor:
    processor = CLIPImageProcessorPil()
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)


def contrastive_loss(logits: torch.Tensor, scenes: Sequence[drawn.Scene]) -> torch.Tensor:
    """Compute CLIP's loss with scenes of equal composition as positives of each other."""
    keys: dict[tuple[tuple[str, str], ...], int] = {}
    numbers = torch.tensor([keys.setdefault(tuple(sorted(s.composition.elements())), len(keys)) for s in scenes])
    target = (numbers[:, None] == numbers).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def region_losses(logits: dict[str, torch.Tensor], grids: Grids) -> dict[str, torch.Tensor]:
    """Compute the losses of each patch's object and its position. Patches without an object show background."""
    coverage, owner = grids.coverage.max(dim=1)  # each (batch, patches)
    shown, empty = coverage > 0.15, coverage == 0
    colors, shapes = grids.colors.gather(1, owner)[shown], grids.shapes.gather(1, owner)[shown]
    x, y = (grids.centres[..., axis].gather(1, owner)[shown] for axis in (0, 1))
    names = torch.full(coverage.shape, -100).masked_fill(empty, len(COLORS) * len(SHAPES))
    names[shown] = colors * len(SHAPES) + shapes
    losses = {"name": F.cross_entropy(logits["name"].flatten(0, 1), names.flatten())}
    for group, target in (("color", colors), ("shape", shapes), ("column", (x * NUM_BINS).long()),
                          ("row", (y * NUM_BINS).long()), ("side", torch.stack((1 - x, x), -1)),
                          ("height", torch.stack((1 - y, y), -1))):  # fmt: skip
        losses[group] = F.cross_entropy(logits[group][shown], target)
    return losses


def train_tower(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, batch_size: int = 192) -> CLIPModel:
    torch.manual_seed(seed)
    rng = random.Random(f"tower {seed}")
    tower = Tower(tokenizer)
    optimizer = torch.optim.AdamW(tower.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    pool = [drawn.sample_scene(rng, "train") for _ in range(min(40_000, steps * batch_size))]
    pixels = np.stack([np.asarray(drawn.draw_scene(scene)) for scene in pool])
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        chosen = [rng.randrange(len(pool)) for _ in range(batch_size)]
        scenes = [pool[index] for index in chosen]
        image_embeds, patches = tower.encode_images(pixels[chosen])
        text_embeds = tower.encode_texts([rng.choice(drawn.captions(scene, rng)) for scene in scenes])
        whole = contrastive_loss(tower.clip.logit_scale.exp().clamp(max=100) * image_embeds @ text_embeds.T, scenes)
        regions = region_losses(tower.patch_logits(patches), lay_out(scenes))
        loss = whole + torch.stack(list(regions.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49 or step == steps - 1:
            detail = " ".join(f"{name} {value.item():.2f}" for name, value in regions.items())
            print(
                f"tower {step + 1}/{steps} ({time.time() - started:.0f} s): whole {whole.item():.2f} {detail}",
                flush=True,
            )
    evaluate_tower(tower.eval(), random.Random(f"tower evaluation {seed}"))
    return tower.clip


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
    grids = lay_out(scenes)
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


def make_slots(grids: Grids, embedding: torch.Tensor, words: dict[str, int], generator: torch.Generator,
               noise: float = 1.0) -> torch.Tensor:  # fmt: skip
    """Make noisy features at the positions of the patches: float (batch, NUM_SLOTS, hidden).

    Each slot mixes the embeddings of the words for its objects (color, shape, place), weighted by the share of the slot
    that each object covers. A linear projection of a tower's features replaces the slots later. So everything that a
    projection does not determine varies: scale, offset, noise, the share of each attribute, leaks between objects and
    lost attributes.
    """

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    batch, num_objects, _ = grids.coverage.shape
    ids = torch.tensor([words[word] for word in (*COLORS, *SHAPES, *PLACES, "background")])
    # at equal length: embeddings of frequent words are longer, and would dominate the mixture
    vectors = F.normalize(embedding[ids], dim=-1) * embedding[ids].detach().norm(dim=-1).mean()
    hidden = vectors.shape[-1]
    colors = F.one_hot(grids.colors.clamp(min=0), len(COLORS)).float()
    shapes = F.one_hot(grids.shapes.clamp(min=0), len(SHAPES)).float()
    x, y = grids.centres.unbind(-1)
    places = torch.stack((1 - 2 * x, 2 * x - 1, 1 - 2 * y, 2 * y - 1), -1)
    # (batch, slots, objects): the weight of each object in a slot
    share = (grids.coverage * uniform(batch, 1, 1, low=1, high=4)).clamp(0, 1).transpose(1, 2)
    share = share ** uniform(batch, 1, 1, low=0.3, high=1.5)
    share = share * (share / share.amax(-1, keepdim=True).clamp(min=1e-6)) ** uniform(batch, 1, 1, high=3)
    facts = []
    for attribute in (colors, shapes, places):
        number = attribute.shape[-1]
        confusion = noise * 0.5 * uniform(batch, 1, 1) * uniform(batch, num_objects, number)
        lost = uniform(batch, NUM_SLOTS, num_objects) < noise * 0.25 * uniform(batch, 1, 1)
        gain = torch.exp(0.4 * noise * normal(batch, 1, 1)) * (1 + 0.2 * noise * normal(batch, NUM_SLOTS, num_objects))
        facts.append((share * gain * ~lost) @ (attribute + confusion * (grids.colors >= 0)[..., None]))
    empty = (1 - share.sum(-1, keepdim=True)).clamp(min=0) * uniform(batch, 1, 1, low=0, high=1)
    slots = torch.cat((*facts, empty), -1) @ vectors
    size = vectors.detach().pow(2).mean().sqrt()
    slots = slots + size * noise * (
        0.8 * uniform(batch, 1, 1) * normal(batch, NUM_SLOTS, hidden)
        + 0.7 * uniform(batch, 1, 1) * normal(batch, 1, hidden)
    )
    return slots * torch.exp(0.5 * noise * normal(batch, 1, 1))


@dataclass
class Texts:
    """A batch for the decoder: token ids and labels (-100 where unsupervised), right padded."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def tokenize(tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[tuple[str, str]]],
             answers_only: Sequence[bool]) -> Texts:  # fmt: skip
    end = tokenizer.eos_token_id
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    for turns, only in zip(conversations, answers_only, strict=True):
        ids.append([])
        labels.append([])
        for prompt, answer in turns:
            question, reply = tokenizer(prompt).input_ids, [*tokenizer(answer).input_ids, end]
            ids[-1] += question + reply
            labels[-1] += ([-100] * len(question) if only else question) + reply
    longest = max(map(len, ids))
    return Texts(torch.tensor([each + [end] * (longest - len(each)) for each in ids]),
                 torch.tensor([each + [-100] * (longest - len(each)) for each in labels]))  # fmt: skip


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


def train_decoder(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, batch_size: int = 32) -> PhiForCausalLM:
    torch.manual_seed(seed)
    rng = random.Random(f"decoder {seed}")
    generator = torch.Generator().manual_seed(seed)
    end = tokenizer.eos_token_id
    config = PhiConfig(
        vocab_size=len(tokenizer) + SPARE_ROWS, hidden_size=128, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=4, max_position_embeddings=512, partial_rotary_factor=0.5, resid_pdrop=0.0,
        hidden_act="gelu_pytorch_tanh",  # equals phi-2's gelu_new up to rounding, four times as fast
        bos_token_id=end, eos_token_id=end, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    decoder = PhiForCausalLM(config)
    words = {word: tokenizer(f" {word}").input_ids[-1] for word in (*COLORS, *SHAPES, *PLACES, "background")}
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    started = time.time()
    running: list[float] = []
    batches: list[list[tuple[drawn.Scene, list[tuple[str, str]]]]] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        if not batches:
            basics = step < BASICS_SHARE * steps
            size = 3 * batch_size if basics else batch_size
            pairs = [(scene, turns_of(scene, rng, basics)) for scene in sample_scenes(rng, 8 * size)]
            pairs.sort(key=lambda pair: sum(len(prompt) + len(answer) for prompt, answer in pair[1]))
            batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
            rng.shuffle(batches)
        scenes, conversations = zip(*batches.pop(), strict=True)
        blind = rng.random() < 0.12  # without slots the whole text is supervised, with slots the answers
        texts = tokenize(tokenizer, conversations, [not blind] * len(scenes))
        embedding = decoder.get_input_embeddings().weight
        noise = min(0.5, max(0.0, 1.5 * step / steps - 0.5))  # clean slots first
        slots = None if blind else make_slots(lay_out(scenes), embedding, words, generator, noise)
        loss = F.cross_entropy(*decoder_logits(decoder, slots, texts))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if not blind:
            running.append(loss.item())
        if step % 100 == 99 or step == steps - 1:
            print(
                f"decoder {step + 1}/{steps} ({time.time() - started:.0f} s): loss {np.mean(running[-50:]):.3f}",
                flush=True,
            )
        if step % 200 == 199 or step == steps - 1:
            evaluate_decoder(decoder.eval(), tokenizer, words, random.Random(f"decoder evaluation {seed}"))
            decoder.train()
    decoder.config.resid_pdrop, decoder.config.hidden_act = 0.1, "gelu_new"  # as in phi-2's config
    return decoder.eval()


@torch.no_grad()
def evaluate_decoder(decoder: PhiForCausalLM, tokenizer: PreTrainedTokenizerFast, words: dict[str, int],
                     rng: random.Random, num_scenes: int = 192) -> dict[str, float]:  # fmt: skip
    """Measure the share of exactly right answers on unseen compositions, from slots with a fifth of the noise."""
    generator = torch.Generator().manual_seed(0)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for _ in range(num_scenes // 48):
        scenes = [drawn.sample_scene(rng, "val") for _ in range(48)]
        turns = [[(f"Instruct: {q}\nOutput:", f" {a}") for q, a in drawn.dialogue(scene, rng)] for scene in scenes]
        texts = tokenize(tokenizer, turns, [True] * 48)
        slots = make_slots(lay_out(scenes), decoder.get_input_embeddings().weight, words, generator, noise=0.2)
        logits, labels = decoder_logits(decoder, slots, texts)
        tokens = iter((logits.argmax(-1) == labels).tolist())
        for prompt, answer in (turn for conversation in turns for turn in conversation):
            correct = min(next(tokens) for _ in range(len(tokenizer(answer).input_ids) + 1))
            kind = "count" if "many" in prompt else "color" if "color" in prompt else "shape" if "hape" in prompt else \
                "presence" if " a " in prompt or " an " in prompt else "relation"  # fmt: skip
            right[kind] += correct
            asked[kind] += 1
    accuracy = {kind: right[kind] / asked[kind] for kind in sorted(asked)} | {"all": right.total() / asked.total()}
    print(
        "decoder, unseen compositions:",
        ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items()),
        flush=True,
    )
    return accuracy


# ----------------------------------------------------------------------------------------------------------- saving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for vision/ and text/")
    parser.add_argument(
        "--tower_steps", type=int, default=1000, help="training steps of 192 images (default: %(default)s)"
    )
    parser.add_argument(
        "--decoder_steps", type=int, default=3000, help="training steps of 32 texts (default: %(default)s)"
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
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    tokenizer = train_tokenizer(options.seed)
    print(f"tokenizer: {len(tokenizer)} entries", flush=True)
    if "vision" in options.parts:
        clip = train_tower(tokenizer, options.tower_steps, options.seed).half()
        clip.save_pretrained(options.output / "vision")
        tokenizer.save_pretrained(options.output / "vision")
        size = drawn.IMAGE_SIZE
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        processor.save_pretrained(options.output / "vision")
    if "text" in options.parts:
        decoder = train_decoder(tokenizer, options.decoder_steps, options.seed).half()
        decoder.generation_config = GenerationConfig(
            bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id
        )
        decoder.save_pretrained(options.output / "text", max_shard_size="1500KB")
        tokenizer.save_pretrained(options.output / "text")


if __name__ == "__main__":
    main()
