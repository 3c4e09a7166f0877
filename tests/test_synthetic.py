"""The drawn scenes: deterministic, in the official layouts, with questions that cannot be answered blind."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_scores import mentioned_objects, object_f1, question_kind

from clip_phi.data import synthetic as drawn

NUM_TRAIN, NUM_VAL = 12, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    drawn.write_dataset(folder, NUM_TRAIN, NUM_VAL, seed=3)
    return folder


@pytest.fixture(scope="module")
def questions():
    """(scene, question, answer) of 4000 scenes."""
    rng = random.Random(0)
    scenes = [drawn.sample_scene(rng, "val") for _ in range(4000)]
    return [(scene, question, answer) for scene in scenes for question, answer in drawn.dialogue(scene, rng)]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(folder, tmp_path):
    before = contents(folder)
    drawn.write_dataset(folder, NUM_TRAIN, NUM_VAL, seed=3)
    assert contents(folder) == before
    drawn.write_dataset(tmp_path, NUM_TRAIN, NUM_VAL, seed=4)
    assert contents(tmp_path).keys() == before.keys()
    assert contents(tmp_path)["llava_instruct_val.json"] != before["llava_instruct_val.json"]


def test_files_have_the_official_layouts(folder):
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        captions = json.loads((folder / f"annotations/captions_{split}2017.json").read_text())
        instances = json.loads((folder / f"annotations/instances_{split}2017.json").read_text())
        assert {"info", "licenses", "images", "annotations"} <= captions.keys()
        assert captions["images"] == instances["images"] and len(captions["images"]) == count
        assert Counter(row["image_id"] for row in captions["annotations"]) == {i["id"]: 5 for i in captions["images"]}
        categories = {row["id"]: row["name"] for row in instances["categories"]}
        truth = defaultdict(Counter)
        for row in instances["annotations"]:
            assert row["iscrowd"] == 0 and row["bbox"][2] * row["bbox"][3] == row["area"]
            truth[row["image_id"]][tuple(categories[row["category_id"]].split())] += 1
        for image in captions["images"]:
            with Image.open(folder / f"{split}2017" / f"{image['id']:012d}.jpg") as picture:
                assert (picture.format, picture.size) == ("JPEG", (image["width"], image["height"]))
        for row in captions["annotations"]:
            assert mentioned_objects(row["caption"]) == truth[row["image_id"]], row["caption"]
        records = json.loads((folder / f"llava_instruct_{split}.json").read_text())
        assert len({record["id"] for record in records}) == len(records) == 2 * count
        for record in records:
            turns = record["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
            assert (folder / f"{split}2017" / record["image"]).is_file()


def test_train_and_val_share_no_composition():
    rng = random.Random(1)
    compositions = {
        split: {tuple(sorted(drawn.sample_scene(rng, split).composition.items())) for _ in range(1500)}
        for split in drawn.SPLITS
    }
    assert not compositions["train"] & compositions["val"]
    pairs = [("red", "circle"), ("blue", "square"), ("red", "circle")]
    assert drawn.split_of(pairs) == drawn.split_of(pairs[::-1]) in drawn.SPLITS
    with pytest.raises(ValueError, match="test"):
        drawn.sample_scene(rng, "test")


def test_scenes_fit_the_image_and_objects_do_not_touch():
    rng = random.Random(2)
    numbers = Counter()
    for _ in range(500):
        scene = drawn.sample_scene(rng, "train")
        numbers[len(scene.objects)] += 1
        for index, item in enumerate(scene.objects):
            left, top, width, height = item.box
            assert min(left, top) >= 0 and max(left + width, top + height) <= drawn.IMAGE_SIZE
            for other in scene.objects[:index]:
                distance = max(abs(item.x - other.x), abs(item.y - other.y))
                assert distance > item.radius + other.radius
    assert set(numbers) == {1, 2, 3} and min(numbers.values()) > 130
    assert np.array_equal(drawn.draw_scene(scene), drawn.draw_scene(scene))


def test_each_object_is_drawn_in_its_color():
    rng = random.Random(5)
    for _ in range(50):
        scene = drawn.sample_scene(rng, "train")
        pixels = np.asarray(drawn.draw_scene(scene)).astype(int)
        for item in scene.objects:
            left, top, width, height = item.box
            box = pixels[top : top + height, left : left + width].reshape(-1, 3)
            near = {color: (np.abs(box - rgb).max(1) < 45).mean() for color, rgb in drawn.COLORS.items()}
            assert max(near, key=near.__getitem__) == item.color and near[item.color] > 0.15


def test_answers_are_true(questions):
    for scene, question, answer in questions:
        named = set(mentioned_objects(question))
        if question in drawn._COUNT_QUESTIONS:
            assert drawn.NUMBERS.index(answer) == len(scene.objects)
        elif answer in drawn.COLORS:
            (shape,) = [shape for shape in drawn.SHAPES if f" {shape} " in question.replace("?", " ")]
            assert [item.color for item in scene.objects if item.shape == shape] == [answer]
        elif answer in drawn.SHAPES:
            (color,) = [color for color in drawn.COLORS if f" {color} " in question.replace("?", " ")]
            assert [item.shape for item in scene.objects if item.color == color] == [answer]
        elif len(named) == 1:
            assert (answer == "yes") == (named <= scene.composition.keys())
        else:
            relation = next(relation for relation in drawn.RELATIONS if relation in question)
            first_name, second_name = question.removeprefix("Is the ").removesuffix("?").split(f" {relation} the ")
            (first,) = [item for item in scene.objects if item.name == first_name]
            (second,) = [item for item in scene.objects if item.name == second_name]
            holds = {"to the left of": first.x < second.x, "to the right of": first.x > second.x,
                     "above": first.y < second.y, "below": first.y > second.y}  # fmt: skip
            assert (answer == "yes") == holds[relation]


def test_every_question_has_the_kind_of_its_answer(questions):
    seen = Counter()
    for _, question, answer in questions:
        kind = question_kind(question)
        if answer in ("yes", "no"):
            upright = "above" in question or "below" in question
            relation = "above_below" if upright else "left_right"
            assert kind == (relation if question.startswith("Is the ") else "presence"), question
        else:
            answers = {"color": drawn.COLORS, "shape": drawn.SHAPES, "count": drawn.NUMBERS}
            assert answer in answers[kind], question
        seen[kind] += 1
    assert len(seen) == 6 and min(seen.values()) > 300


def test_descriptions_name_every_object():
    rng = random.Random(6)
    for _ in range(300):
        scene = drawn.sample_scene(rng, "train")
        request, answer = drawn.description(scene, rng)
        assert mentioned_objects(answer) == scene.composition and not mentioned_objects(request)


def test_yes_and_no_and_counts_are_balanced(questions):
    for relational in (False, True):
        answers = Counter(a for _, q, a in questions if a in ("yes", "no") and q.startswith("Is the ") == relational)
        assert abs(answers["yes"] / answers.total() - 0.5) < 0.03
    counts = Counter(answer for _, question, answer in questions if question in drawn._COUNT_QUESTIONS)
    assert max(counts.values()) / counts.total() < 0.38
    negatives = [(scene, *mentioned_objects(q)) for scene, q, a in questions if a == "no" and "Is the" not in q]
    hard = [any(color == o.color or shape == o.shape for o in scene.objects) for scene, (color, shape) in negatives]
    assert abs(np.mean(hard) - 0.5) < 0.04


def test_no_guess_from_the_question_alone_is_right_in_more_than_55_percent(questions):
    """The majority answer of each wording, objects named included, learnt from one half and judged on the other."""
    seen = defaultdict(Counter)
    half = len(questions) // 2
    for _, question, answer in questions[:half]:
        seen[question][answer] += 1
    guesses = [seen[question].most_common(1)[0][0] if seen[question] else "yes" for _, question, _ in questions[half:]]
    assert np.mean([guess == answer for guess, (_, _, answer) in zip(guesses, questions[half:], strict=True)]) <= 0.5


@pytest.mark.parametrize(
    ("text", "truth", "score"),
    [
        ("A red circle and two blue squares.", {("red", "circle"): 1, ("blue", "square"): 2}, 1.0),
        ("A red circle and a blue square.", {("red", "circle"): 1, ("blue", "square"): 2}, 0.8),
        ("two Red crosses", {("red", "cross"): 2}, 1.0),
        ("a red circle, a red circle", {("red", "circle"): 1}, 2 / 3),
        ("a circle that is red", {("red", "circle"): 1}, 0.0),
        ("a red square above a blue circle", {("red", "circle"): 1, ("blue", "square"): 1}, 0.0),
        ("", {("red", "circle"): 1}, 0.0),
    ],
)
def test_object_f1(text, truth, score):
    assert object_f1(text, Counter(truth)) == pytest.approx(score)


def test_the_verb_agrees_with_what_comes_first():
    rng = random.Random(7)
    found = Counter()
    for _ in range(300):
        scene = drawn.sample_scene(rng, "train")
        for text in [*drawn.captions(scene, rng), drawn.description(scene, rng)[1]]:
            if text.startswith("There"):
                verb, first = text.split()[1:3]
                assert (verb, first in ("a", "an")) in {("is", True), ("are", False)}, text
                found[verb] += 1
    assert min(found["is"], found["are"]) > 20


def test_descriptions_name_the_objects_in_reading_order():
    lower_left = drawn.DrawnObject("red", "circle", 10, 50, 7)
    upper_right = drawn.DrawnObject("blue", "star", 50, 14, 7)
    upper_left = drawn.DrawnObject("pink", "ring", 20, 10, 7)
    scene = drawn.Scene((lower_left, upper_right, upper_left), (240, 240, 240), 0)
    _, text = drawn.description(scene, random.Random(0))
    assert "a pink ring, a blue star and a red circle" in text
