"""clip-phi preferences: which samples make a pair, on examples that are worked by hand, and its file."""

import argparse
import json
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest

from clip_phi.batching.images import load_image
from clip_phi.cli import main
from clip_phi.commands.preferences import _compare
from clip_phi.data.report import Report
from clip_phi.data.source import parse_source
from clip_phi.data.synthetic import COLORS, SHAPES, write_dataset
from clip_phi.evaluation.chair import ChairScorer, objects_file
from clip_phi.evaluation.tasks import make_eval_set, read_samples


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=0, num_val=4)
    return folder


def source(data, task):
    file = "llava:{0}/llava_instruct_val.json" if task == "vqa" else "coco:{0}/annotations/captions_val2017.json"
    return f"{file.format(data)},images={data}/val2017"


def options(*words, **given):
    usual = {"samples": len(words), "temperature": 1.0, "max_new_tokens": 9, "seed": 5}
    return argparse.Namespace(**usual | given)


def engine_that_says(*words, instruction="Describe."):
    """Words that end in "..." are cut at the limit."""

    class Engine:
        model = SimpleNamespace(config=SimpleNamespace(caption_instruction=instruction))
        asked: list = []

        def submit_many(self, messages, images, callbacks, **sampling):
            self.asked.append((messages, images, len(callbacks), sampling))
            ends = ["length" if word.endswith("...") else "stop" for word in words]
            return [
                SimpleNamespace(result=lambda word=word: word, finish_reason=end)
                for word, end in zip(words, ends, strict=True)
            ]

    return Engine()


def compare(data, task, number, *words):
    report, parsed = Report(), parse_source(source(data, task))
    eval_set = make_eval_set(task, read_samples([parsed], report), report)
    eval_set.items = (
        [item._replace(references=("yes",)) for item in eval_set.items] if task == "vqa" else eval_set.items
    )
    engine = engine_that_says(*words)
    objects = objects_file(None, [parsed])
    chair = ChairScorer(eval_set, objects) if objects else None
    row, counts = _compare(number, engine, eval_set, chair, options(*words))
    ((messages, images, _, sampling),) = engine.asked
    assert sampling["seed"] == 5 + number * len(words)
    if row is not None:
        text = messages[0]["content"][-1]["text"]
        assert row["prompt"] == [{"role": "user", "content": text}] and len(row["images"]) == len(images) == 1
        assert load_image(row["images"][0]["bytes"]).tobytes() == images[0].tobytes()
        row = row["chosen"][0]["content"], row["rejected"][0]["content"]
    assert sum(count for kind, count in counts.items() if kind.startswith("samples")) == len(words)
    return row, {kind: count for kind, count in counts.items() if count}


@pytest.mark.parametrize(
    ("words", "pair", "reason"),
    [
        (("no", "Yes.", "blue", "no"), ("Yes.", "no"), "pair: the better one is a sample"),
        (("no", "blue", "blue"), ("yes", "blue"), "pair: the better one is a reference"),
        (("yes", " ", "yes..."), None, "no pair: no sample is wrong"),
        (("", "no..."), None, "no pair: no sample is wrong"),
    ],
)
def test_a_wrong_answer_is_paired_with_a_right_one(data, words, pair, reason):
    found, counts = compare(data, "vqa", 1, *words)
    assert found == pair and counts[reason] == 1
    unusable = sum(not word.strip() or word.endswith("...") for word in words)
    assert counts.get("samples: empty or cut", 0) == unusable


def test_a_caption_with_absent_objects_is_paired_with_one_that_says_as_much(data):
    instances = json.loads((data / "annotations/instances_val2017.json").read_text())
    names = {each["id"]: each["name"] for each in instances["categories"]}
    there = [names[each["category_id"]] for each in instances["annotations"]]
    images = [each["image_id"] for each in instances["annotations"]]
    rich = next(image for image in images if len({n for n, i in zip(there, images, strict=True) if i == image}) > 1)
    number = [image["id"] for image in instances["images"]].index(rich)
    first, second = sorted({name for name, image in zip(there, images, strict=True) if image == rich})[:2]
    absent = [f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in there]
    wrong = f"A {first}, a {absent[0]} and a {absent[1]}."
    best, least, silent = f"A {first} and a {second}.", f"A {second}.", "A picture."
    say = (silent, least, f"A {absent[0]}.", wrong, best)
    (chosen, rejected), counts = compare(data, "captions", number, *say)
    assert rejected == wrong and chosen.count(first) == chosen.count(second) == 1
    assert counts["samples: right"] == 3 and counts["samples: wrong"] == 2
    # A caption that hides an object is not better than one that names it beside what is not there.
    (chosen, _), counts = compare(data, "captions", number, silent, f"A {first}, a {second}, a {absent[0]}.")
    assert counts["pair: the better one is a reference"] == 1 and first in chosen and second in chosen
    # Two different objects named rightly, in a sample: chosen before a reference that says no more.
    two = len({name for name, image in zip(there, images, strict=True) if image == rich}) == 2
    assert counts != {} and (compare(data, "captions", number, best, wrong)[0][0] == best) == two


def test_the_file_is_read_by_datasets_and_equal_seeds_give_equal_pairs(checkpoint, data, tmp_path, capsys):
    def rows(name, *more):
        file = tmp_path / name
        command = ["preferences", checkpoint, file, "--task", "vqa", "--data", source(data, "vqa"), *more]
        assert main([*map(str, command), "--samples", "32", "--max_new_tokens", "40"]) == 0
        return datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(tmp_path / "cache"))["train"], file

    first, file = rows("a.parquet")
    printed = capsys.readouterr().out
    counted = Counter({line[10:]: int(line[:9].replace(",", "")) for line in printed.splitlines()[1:]})
    prompts = int(printed.split(" of ")[1].split()[0])
    pairs = sum(count for kind, count in counted.items() if kind.startswith("pair:"))
    assert pairs == len(first) > 0 and printed.startswith(f"{pairs} pairs in {file}")
    assert sum(count for kind, count in counted.items() if kind.startswith(("pair:", "no pair:"))) == prompts
    assert sum(count for kind, count in counted.items() if kind.startswith("samples:")) == 32 * prompts
    assert counted["left out: answer is longer than 3 words"] > 0
    assert sorted(first.column_names) == ["chosen", "images", "prompt", "rejected"]
    assert first[0]["images"][0].size == load_image(next(iter((data / "val2017").iterdir()))).size
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in first]
    assert all([turn["role"] for part in text for turn in part] == ["user", "assistant", "assistant"] for text in texts)
    again, other = rows("b.parquet")[0], rows("c.parquet", "--seed", "1")[0]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in again] == texts
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in other] != texts


def test_what_can_give_no_pair_is_refused_in_one_line(checkpoint, data, tmp_path, capsys):
    (tmp_path / "there.parquet").touch()
    objects = data / "annotations/instances_val2017.json"
    alone = tmp_path / "alone_captions.json"
    alone.write_text((data / "annotations/captions_val2017.json").read_text())
    for name, task, text, more, message in (
        ("there.parquet", "vqa", source(data, "vqa"), [], "must end in .parquet, and not exist yet"),
        ("out.json", "vqa", source(data, "vqa"), [], "must end in .parquet"),
        ("o.parquet", "vqa", source(data, "vqa"), ["--objects", objects], "is for --task captions"),
        ("o.parquet", "captions", f"coco:{alone},images={data}/val2017", [], "--objects FILE"),
        ("o.parquet", "captions", source(data, "captions"), [], "take a model of stage 2"),
        ("o.parquet", "vqa", source(data, "vqa"), ["--max_new_tokens", 1, "--samples", 1], "no pair"),
        ("o.parquet", "vqa", source(data, "vqa"), ["--samples", 33], "room for 32"),
    ):
        command = ["preferences", checkpoint, tmp_path / name, "--task", task, "--data", text, *more]
        assert main([*map(str, command)]) == 2, message
        error = capsys.readouterr().err.splitlines()
        assert message in error[-1] and error[-1].startswith("clip-phi: error:"), error
    assert not (tmp_path / "o.parquet").exists()
