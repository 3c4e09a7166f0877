"""CHAIR by its published definition (arXiv 1809.02156), on captions that are counted by hand."""

import json
import re

import numpy as np
import pytest

from clip_phi.cli import main
from clip_phi.data.report import Report
from clip_phi.data.source import parse_source
from clip_phi.data.synthetic import COLORS, SHAPES, write_dataset
from clip_phi.evaluation.bootstrap import margin_interval
from clip_phi.evaluation.chair import WORDS, ChairScorer, ObjectWords, add_chair
from clip_phi.evaluation.evaluate import EvalResult
from clip_phi.evaluation.tasks import make_eval_set, read_samples

CATEGORIES = [name for name in WORDS if name]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=0, num_val=4)
    return folder


def eval_set_of(folder):
    report = Report()
    source = parse_source(f"coco:{folder}/annotations/captions_val2017.json,images={folder}/val2017")
    return make_eval_set("captions", read_samples([source], report), report)


@pytest.fixture
def photos(data, tmp_path):
    """The four images with COCO's categories: a dog and two persons; a cat; nothing; a dining table."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").symlink_to(data / "val2017")
    captions = json.loads((data / "annotations/captions_val2017.json").read_text())
    instances = json.loads((data / "annotations/instances_val2017.json").read_text())
    ids = [image["id"] for image in captions["images"]]
    texts = [["A man walks a dog.", "People on a bench"], ["A kitten"], ["An empty street"], ["Food on a table"]]
    captions["annotations"] = [
        {"id": 10 * n + k, "image_id": ids[n], "caption": text}
        for n, four in enumerate(texts)
        for k, text in enumerate(four)
    ]
    instances["categories"] = [{"id": n, "name": name} for n, name in enumerate(CATEGORIES)]
    there = [(0, "dog"), (0, "person"), (0, "person"), (1, "cat"), (3, "dining table")]
    instances["annotations"] = [
        {"id": n, "image_id": ids[image], "category_id": CATEGORIES.index(name), "bbox": [0, 0, 9, 9]}
        for n, (image, name) in enumerate(there)
    ]
    for name, content in (("captions", captions), ("instances", instances)):
        (tmp_path / f"annotations/{name}_val2017.json").write_text(json.dumps(content))
    return tmp_path


def test_chair_equals_the_published_definition_on_a_hand_worked_example(photos):
    eval_set = eval_set_of(photos)
    score = ChairScorer(eval_set, photos / "annotations/instances_val2017.json")
    # The bench is in a reference caption alone, and counts as there. The second cat is a mention of its own.
    captions = ["A boy, his puppies and a cat on a bench", "Two cats, a cat and a dog", "A street", "Plates on tables"]
    counts, hallucinated = score(captions)
    assert hallucinated == [["cat"], ["dog"], [], []]
    assert counts[:, :2].tolist() == [[1, 4], [1, 3], [0, 0], [0, 1]]
    evaluation = EvalResult({"metrics": {}, "seed": 0}, [{} for _ in captions])
    add_chair(
        evaluation, eval_set, score, {"score": captions, "blind": ["A man and a horse"] * 4, "shuffled": captions}
    )
    scores = evaluation.result["metrics"]
    assert scores["CHAIRi"] == {"score": 2 / 8, "blind": 7 / 8, "shuffled": 2 / 8}
    assert scores["CHAIRs"] == {"score": 2 / 4, "blind": 1.0, "shuffled": 2 / 4}
    assert scores["object_recall"] == {"score": 1.0, "blind": 1 / 4, "shuffled": 1.0}
    assert evaluation.result["chair"]["CHAIRi"] == {"margin": 0.0, "margin_ci95": [0.0, 0.0]}
    assert [sample["hallucinated"] for sample in evaluation.samples] == hallucinated


def test_the_interval_of_a_ratio_is_that_of_resampled_ratios():
    rng = np.random.default_rng(0)
    wrong, mentions = rng.integers(0, 3, (50, 3)), rng.integers(3, 6, (50, 3))
    low, high = margin_interval(wrong, mentions, seed=3)
    drawn = np.random.default_rng(7).integers(0, 50, (4000, 50))
    ratios = wrong[drawn].sum(1) / mentions[drawn].sum(1)
    expected = np.percentile(ratios[:, 0] - ratios[:, 1:].max(1), [2.5, 97.5])
    assert np.allclose([low, high], expected, atol=0.01)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Two hot dogs beside a teddy-bear", ["hot dog", "teddy bear"]),
        ("A baby elephant and a baby", ["elephant", "person"]),
        ("a passenger jet; PASSENGERS in passenger trains", ["airplane", "person", "train"]),
        ("the seat of a toilet", ["toilet"]),
        ("a toilet seat", ["toilet"]),
        ("A seat.", ["chair"]),
        ("A player at home plate", ["person"]),
        ("a bow tie, wine glasses, knives and sandwiches", ["tie", "wine glass", "knife", "sandwich"]),
        ("geese, ponies, buses, benches, mice", ["bird", "horse", "bus", "bench", "mouse"]),
        ("a man's car", ["person", "car"]),
        ("a scar on a carpet at four o'clock", []),
        ("", []),
    ],
)
def test_the_words_of_cocos_objects(text, names):
    assert ObjectWords(CATEGORIES).mentions(text) == names


def test_categories_of_other_data_are_read_as_the_captions_are():
    find = ObjectWords(["T-shirt", "cell_phone", "Hot Dog!"])
    assert find.mentions("a t-shirt, two cell phones and a hot dog") == ["T-shirt", "cell_phone", "Hot Dog!"]


def test_an_id_that_means_another_image_is_refused(photos):
    eval_set = eval_set_of(photos)
    eval_set.items[0] = eval_set.items[0]._replace(id=eval_set.items[1].id)
    with pytest.raises(ValueError, match=r"the image with id \d+ is not 0\d+\.jpg"):
        ChairScorer(eval_set, photos / "annotations/instances_val2017.json")


def test_every_category_is_found_by_its_own_name_and_no_word_means_two():
    find = ObjectWords(CATEGORIES)
    assert len(CATEGORIES) == 80 and all(find.mentions(f"a {name}") == [name] for name in CATEGORIES)
    words = [word for group in WORDS.values() for word in group]
    assert len(words) == len(set(words)) and all(re.fullmatch(r"[a-z ]+", word) for word in words)


def test_true_captions_of_drawn_scenes_name_nothing_that_is_not_there(data):
    eval_set = eval_set_of(data)
    score = ChairScorer(eval_set, data / "annotations/instances_val2017.json")
    counts, _ = score([item.references[0] for item in eval_set.items])
    assert counts[:, 0].sum() == 0 and counts[:, 4].tolist() == counts[:, 5].tolist()
    absent = next(f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in score.allowed[0])
    assert score([f"A {absent}."] * 4)[1][0] == [absent]


def test_instances_without_the_images_or_of_another_form_are_refused(photos):
    eval_set = eval_set_of(photos)
    path = photos / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    for wrong, message in (
        (content | {"images": content["images"][1:], "annotations": []}, "lacks image 0"),
        (content | {"categories": content["categories"][5:]}, "lacks or misses"),
        ({"images": []}, "not a COCO instances file"),
        (content | {"annotations": ["x"]}, "not a COCO instances file"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            ChairScorer(eval_set, path)


def test_evaluate_reports_chair_beside_the_other_metrics(data, photos, model, processor, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    def evaluate(where, task, *options):
        source = f"coco:{where}/annotations/captions_val2017.json,images={where}/val2017"
        words = ["evaluate", folder, "--task", task, "--data", source, "--max_new_tokens", 3, *options]
        return main([str(word) for word in words])

    assert evaluate(data, "captions") == 0
    result, shown = json.loads((folder / "evaluation/captions.json").read_text()), capsys.readouterr().out
    for metric in ("CHAIRi", "CHAIRs"):
        assert set(result["metrics"][metric]) == {"score", "blind", "shuffled"}
        assert set(result["chair"][metric]) == {"margin", "margin_ci95"}
        assert f"margin of {metric}" in shown
    samples = [json.loads(line) for line in (folder / "evaluation/captions.samples.jsonl").read_text().splitlines()]
    assert all(isinstance(sample["hallucinated"], list) for sample in samples)
    # Beside the captions, instances that do not fit leave CHAIR out. Given by name, they are refused.
    other = photos / "annotations/instances_val2017.json"
    content = json.loads(other.read_text())
    of_others, message = json.dumps(content | {"images": [], "annotations": []}), f"{other} lacks image"
    for text, problem in ((of_others, message), ("[]", "it needs a list"), ('{"images"', "is not json")):
        other.write_text(text)
        assert evaluate(photos, "captions") == 0
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "CHAIR" in line)
        assert line.startswith("CHAIR is left out: ") and problem in line
        result = json.loads((folder / "evaluation/captions.json").read_text())
        assert "CIDEr-D" in result["metrics"] and "chair" not in result and "CHAIRi" not in result["metrics"]
        assert evaluate(photos, "captions", "--objects", other) == 2 and problem in capsys.readouterr().err
    assert evaluate(photos, "pointing") == 2 and "is not json" in capsys.readouterr().err
    assert evaluate(data, "loss", "--objects", other) == 2
    assert "requires --task captions" in capsys.readouterr().err
    other.unlink()
    assert evaluate(photos, "captions") == 0 and "CHAIR" not in capsys.readouterr().err
