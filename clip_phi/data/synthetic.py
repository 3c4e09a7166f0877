"""Synthetic scenes: coloured shapes on a light background, in the official COCO 2017 and LLaVA-Instruct layouts.

The demo and the whole-script tests train on these. Every scene is a pure function of a seed. A hash of its composition
(the multiset of its (color, shape) pairs) decides whether it belongs to train or val. So no composition of a val scene
is in the training data, those of the shipped backbones included. synthetic.json has the words."""

import hashlib
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .files import replace_file

IMAGE_SIZE = 64
MAX_OBJECTS = 3
SPLITS = ("train", "val")
_WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))  # questions by kind, too
COLORS: dict[str, tuple[int, ...]] = {name: tuple(rgb) for name, rgb in _WORDS["colors"].items()}
SHAPES: dict[str, str] = _WORDS["shapes"]  # with their plurals
CATEGORIES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
NUMBERS, RELATIONS = tuple(_WORDS["numbers"]), tuple(_WORDS["relations"])

_SMALL_RADIUS, _LARGE_RADIUS = 7, 11
_GAP = 2  # pixels left free between two objects, and around the border
_CLEAR_OFFSET = 12  # pixels between two centres, for one to be left of, or above, the other
_SUPERSAMPLING = 4
_VAL_SHARE = 5  # one composition in five is a val composition
_PLACEMENT_TRIES = 200
_COUNT_QUESTIONS = _WORDS["count"]


@dataclass(frozen=True)
class DrawnObject:
    """One shape. x, y: its centre, in pixels from the top left corner. radius: half the side of its box, in pixels."""

    color: str
    shape: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        """For example "red circle": also the object's COCO category."""
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """COCO's bbox: left, top, width, height in pixels."""
        return (self.x - self.radius, self.y - self.radius, 2 * self.radius, 2 * self.radius)


@dataclass(frozen=True)
class Scene:
    """One to three objects that do not touch. background: RGB. texture_seed: of the texture and the noise."""

    objects: tuple[DrawnObject, ...]
    background: tuple[int, ...]
    texture_seed: int

    @property
    def composition(self) -> "Counter[tuple[str, str]]":
        """How often each (color, shape) pair occurs: the ground truth of a description."""
        return Counter((item.color, item.shape) for item in self.objects)


def split_of(composition: Iterable[tuple[str, str]]) -> str:
    """The split of a multiset of (color, shape) pairs, in any order."""
    key = ";".join(f"{color} {shape}" for color, shape in sorted(composition))
    return "val" if hashlib.sha256(key.encode()).digest()[0] % _VAL_SHARE == 0 else "train"


def sample_scene(rng: random.Random, split: str) -> Scene:
    """A random scene of a split, with 1 to 3 objects. Raises ValueError if there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    num_objects = rng.randint(1, MAX_OBJECTS)
    while True:
        pairs: list[tuple[str, str]] = []
        while len(pairs) < num_objects:
            repeat = pairs and rng.random() < 0.2
            pairs.append(rng.choice(pairs) if repeat else (rng.choice(list(COLORS)), rng.choice(list(SHAPES))))
        if split_of(pairs) == split and (objects := _place(pairs, rng)) is not None:
            return Scene(objects, tuple(rng.randint(205, 250) for _ in range(3)), rng.getrandbits(32))


def _place(pairs: Sequence[tuple[str, str]], rng: random.Random) -> tuple[DrawnObject, ...] | None:
    """Give each pair a size and a free place. None if there is no room."""
    placed: list[DrawnObject] = []
    for color, shape in pairs:
        for _ in range(_PLACEMENT_TRIES):
            radius = rng.choice((_SMALL_RADIUS, _LARGE_RADIUS)) + rng.randint(-1, 1)
            low, high = radius + _GAP, IMAGE_SIZE - radius - _GAP
            x, y = rng.randint(low, high), rng.randint(low, high)
            if all(max(abs(x - o.x), abs(y - o.y)) >= radius + o.radius + _GAP for o in placed):
                placed.append(DrawnObject(color, shape, x, y, radius))
                break
        else:
            return None
    return tuple(placed)


def draw_scene(scene: Scene) -> Image.Image:
    """Render a scene: RGB, IMAGE_SIZE x IMAGE_SIZE pixels, equal for equal scenes."""
    rng = np.random.default_rng(scene.texture_seed)
    coarse = np.asarray(scene.background) + rng.normal(0, 6, (8, 8, 1))
    size = (IMAGE_SIZE, IMAGE_SIZE)
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    for item in scene.objects:
        fill = (np.asarray(COLORS[item.color]) + rng.normal(0, 6, 3)).clip(0, 255).astype(int).tolist()
        image.paste(tuple(fill), mask=_mask(item))
    return Image.fromarray((np.asarray(image) + rng.normal(0, 4, (*size, 3))).clip(0, 255).astype(np.uint8))


def _mask(item: DrawnObject) -> Image.Image:
    """Anti-aliased coverage of one object, mode L, IMAGE_SIZE x IMAGE_SIZE."""
    side = IMAGE_SIZE * _SUPERSAMPLING
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    x, y, radius = (value * _SUPERSAMPLING for value in (item.x, item.y, item.radius))
    box = (x - radius, y - radius, x + radius, y + radius)
    if item.shape == "circle":
        draw.ellipse(box, fill=255)
    elif item.shape == "ring":
        draw.ellipse(box, outline=255, width=radius * 2 // 5)
    elif item.shape == "square":
        draw.rectangle(tuple(round(c + 0.1 * radius * s) for c, s in zip(box, (1, 1, -1, -1), strict=True)), fill=255)
    elif item.shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=255)
    elif item.shape == "cross":
        arm = radius // 3
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=255)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)
    else:  # a star
        tips = [(radius if corner % 2 == 0 else 0.42 * radius, math.pi * corner / 5) for corner in range(10)]
        draw.polygon([(x + length * math.sin(turn), y - length * math.cos(turn)) for length, turn in tips], fill=255)
    return mask.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions, as in COCO. Each names every object with its color and number, most in reading order."""
    objects = in_reading_order(scene)
    named, number, shapes = _enumerate(objects), NUMBERS[len(objects)], "shape" if len(objects) == 1 else "shapes"
    texts = [f"{named}.", f"A picture of {named}.", _there_is(objects), f"An image with {named}."]
    texts.append(f"{number} {shapes}: {named}.")
    if (found := _relatable(objects, rng)) is not None:
        first, second, relation = found
        others = _enumerate([item for item in objects if item not in (first, second)])
        related = f"{_article(first.name)} {relation} {_article(second.name)}"
        texts[rng.randrange(4)] = f"{related}, with {others}." if others else f"{related}."
    return [text[0].upper() + text[1:] for text in texts]


def in_reading_order(scene: Scene) -> list[DrawnObject]:
    """A scene's objects in four lines from top to bottom, from left to right in each."""
    return sorted(scene.objects, key=lambda item: (item.y // (IMAGE_SIZE // 4), item.x))


def description(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A request to describe the image and its answer, which names every object in reading order."""
    named = _enumerate(objects := in_reading_order(scene))
    text = rng.choice((f"The image shows {named}.", _there_is(objects), f"I can see {named}."))
    return rng.choice(_WORDS["description"]), text


def dialogue(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Two to four different (question, short answer) turns. Yes and no are equally likely where both are possible."""
    makers: list[Callable[..., Any]] = [ask_color, ask_shape, ask_presence, ask_presence, ask_count, ask_relation]
    rng.shuffle(makers)
    length = rng.randint(2, 4)
    turns: dict[str, str] = {}
    for maker in (*makers, ask_presence, ask_count):
        if len(turns) < length and (turn := maker(scene, rng)) is not None:
            turns.setdefault(*turn)
    return list(turns.items())


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _there_is(objects: Sequence[DrawnObject]) -> str:
    """The verb agrees with what it names first: "There is a red ring and two pink stars." """
    several = sum(item.name == objects[0].name for item in objects) > 1
    return f"There {'are' if several else 'is'} {_enumerate(objects)}."


def _enumerate(objects: Sequence[DrawnObject]) -> str:
    """For example "a red circle and two blue squares", in the order of first appearance. Empty for none."""
    parts = []
    for (color, shape), count in Counter((item.color, item.shape) for item in objects).items():
        parts.append(_article(f"{color} {shape}") if count == 1 else f"{NUMBERS[count]} {color} {SHAPES[shape]}")
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _unique(objects: Sequence[DrawnObject], attribute: str) -> list[DrawnObject]:
    """The objects whose color, shape or name no other object has."""
    counts = Counter(getattr(item, attribute) for item in objects)
    return [item for item in objects if counts[getattr(item, attribute)] == 1]


def _relatable(objects: Sequence[DrawnObject], rng: random.Random) -> tuple[DrawnObject, DrawnObject, str] | None:
    """Two objects whose names are unique in the scene, and a relation that clearly holds, or None."""
    unique = _unique(objects, "name")
    if len(unique) < 2:
        return None
    first, second = rng.sample(unique, 2)
    offsets = (second.x - first.x, first.x - second.x, second.y - first.y, first.y - second.y)
    holding = [relation for relation, offset in zip(RELATIONS, offsets, strict=True) if offset >= _CLEAR_OFFSET]
    return (first, second, rng.choice(holding)) if holding else None


def _ask(scene: Scene, rng: random.Random, by: str, asked: str) -> tuple[str, str] | None:
    """A question about one attribute of an object whose other one is unique, or None if there is none."""
    if not (unique := _unique(scene.objects, by)):
        return None
    item = rng.choice(unique)
    return rng.choice(_WORDS[asked]).format(getattr(item, by)), getattr(item, asked)


ask_color, ask_shape = partial(_ask, by="shape", asked="color"), partial(_ask, by="color", asked="shape")


def ask_presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    question = rng.choice(_WORDS["presence"])
    if rng.random() < 0.5:
        return question.format(_article(rng.choice(scene.objects).name)), "yes"
    confusing = rng.random() < 0.5  # shares its color or its shape with an object that is there
    while True:
        color, shape = rng.choice(list(COLORS)), rng.choice(list(SHAPES))
        shares = any(color == item.color or shape == item.shape for item in scene.objects)
        if shares == confusing and (color, shape) not in scene.composition:
            return question.format(_article(f"{color} {shape}")), "no"


def ask_count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return rng.choice(_COUNT_QUESTIONS), NUMBERS[len(scene.objects)]


def ask_relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """A question whether one object is left, right, above or below another, or None if no two clearly are."""
    if (found := _relatable(scene.objects, rng)) is None:
        return None
    first, second, relation = found
    holds = rng.random() < 0.5
    asked = relation if holds else RELATIONS[RELATIONS.index(relation) ^ 1]
    return f"Is the {first.name} {asked} the {second.name}?", "yes" if holds else "no"


def ask_about_boxes(objects: Sequence[tuple[str, Sequence[float]]]) -> list[tuple[str, str, list[Any]]]:
    """Questions about what is there once, each with its answer and the boxes of its one or two objects.

    objects: category and COCO bbox of each, empty for a crowd. About drawn scenes more can be asked than about others.
    """
    counts = Counter(name for name, _ in objects)
    asked = [(f"Is there {_article(name)}?", "yes", [box]) for name, box in objects if counts[name] == 1 and box]
    if all(name in CATEGORIES for name, _ in objects):
        parts = ((*name.split(), int(x + w / 2), int(y + w / 2), int(w / 2)) for name, (x, y, w, _) in objects)
        drawn = [DrawnObject(*each) for each in parts]  # type: ignore[arg-type]
        for ask in (ask_color, ask_shape, ask_relation):
            if (turn := ask(Scene(tuple(drawn), (0, 0, 0), 0), random.Random(0))) is not None:
                about: list[Any] = [each.box for each in drawn if each.name in turn[0]]
                about = about or [each.box for each in drawn if each.shape in turn[0] or each.color in turn[0]]
                asked.append((*turn, about))
    return asked


def write_dataset(folder: str | os.PathLike[str], num_train: int, num_val: int, seed: int = 0) -> None:
    """Write num_train + num_val scenes under folder in the layouts of COCO 2017 and LLaVA-Instruct-150K.

    annotations/{captions,instances}_{train,val}2017.json, {train,val}2017/%012d.jpg, llava_instruct_{train,val}.json.
    The same arguments give the same bytes. Each json appears whole, after its images."""
    for split, ids in (("train", range(1, num_train + 1)), ("val", range(num_train + 1, num_train + num_val + 1))):
        rng = random.Random(f"{seed} {split}")
        _write_split(Path(folder), split, {image_id: sample_scene(rng, split) for image_id in ids}, rng)


def _write_split(folder: Path, split: str, scenes: dict[int, Scene], rng: random.Random) -> None:
    image_folder = folder / f"{split}2017"
    image_folder.mkdir(parents=True, exist_ok=True)
    categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CATEGORIES, start=1)]
    images, all_captions, instances, conversations = (list[dict[str, Any]]() for _ in range(4))
    for image_id, scene in scenes.items():
        file_name = f"{image_id:012d}.jpg"
        draw_scene(scene).save(image_folder / file_name, quality=95, subsampling=0)
        images.append({"id": image_id, "file_name": file_name, "height": IMAGE_SIZE, "width": IMAGE_SIZE, "license": 1})
        for number, caption in enumerate(captions(scene, rng), start=len(all_captions) + 1):
            all_captions.append({"id": number, "image_id": image_id, "caption": caption})
        for item in scene.objects:
            ids = {"id": len(instances) + 1, "image_id": image_id, "category_id": 1 + CATEGORIES.index(item.name)}
            instances.append(ids | {"bbox": list(item.box), "area": 4 * item.radius**2, "iscrowd": 0})
        for turns in (dialogue(scene, rng), [description(scene, rng)]):
            texts = [text for turn in turns for text in turn]
            texts[0] = f"<image>\n{texts[0]}" if rng.random() < 0.5 else f"{texts[0]}\n<image>"
            messages = [{"from": who, "value": text} for who, text in zip(cycle(("human", "gpt")), texts, strict=False)]
            record_id = f"{image_id:012d}-{len(conversations) % 2}"
            conversations.append({"id": record_id, "image": file_name, "conversations": messages})
    header = {"info": {"description": f"Clip-Phi drawn scenes, {split}"}, "licenses": [{"id": 1, "name": "Apache-2.0"}]}
    header["images"] = images
    contents: dict[str, Any] = {f"annotations/captions_{split}2017": header | {"annotations": all_captions}}
    contents[f"annotations/instances_{split}2017"] = header | {"annotations": instances, "categories": categories}
    for name, content in (contents | {f"llava_instruct_{split}": conversations}).items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        replace_file(path, json.dumps(content))
