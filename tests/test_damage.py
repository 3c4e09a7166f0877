"""Damaged data: every kind of damage is survived and counted exactly, and nothing at all makes a reader fail."""

import json
import random
import subprocess
from collections import Counter
from pathlib import Path

import damage
import helpers
import pytest
import torch
from helpers import make_index

from clip_phi.batching.dataset import ImageReader, SampleDataset
from clip_phi.batching.index import Index, load_index
from clip_phi.data.coco import read_coco_captions, read_karpathy_split, read_vqa
from clip_phi.data.files import MediaFolder
from clip_phi.data.json_files import read_instruct
from clip_phi.data.report import Report
from clip_phi.data.schema import read_records
from clip_phi.data.source import parse_source
from clip_phi.training.logger import TrainingLogger

MAX_LENGTH = 256

# The real script on damaged corpora


def run(cache: Path, *options, **how) -> subprocess.CompletedProcess:
    done = helpers.run(*options, HF_HOME=str(cache), **how)
    assert "Traceback" not in done.stderr
    return done


def report_of(output: Path) -> dict:
    return json.loads((output / "data_report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def clean(folder) -> str:
    """A source to evaluate on."""
    (folder / "clean").mkdir()
    damage.write_good_images(folder / "clean")
    (folder / "clean.json").write_text(json.dumps([damage.record(number) for number in range(4)]), encoding="utf-8")
    return f"llava:{folder}/clean.json,images={folder}/clean"


@pytest.fixture(scope="module")
def coco(folder) -> damage.Corpus:
    return damage.write_coco(folder / "coco")


@pytest.fixture(scope="module")
def llava(folder) -> damage.Corpus:
    return damage.write_llava(folder / "llava")


@pytest.fixture(scope="module")
def stage1(vision_backbone, text_backbone, clean):
    def options(corpus: damage.Corpus, output: Path, *more) -> list:
        return [
            *("--stage", 1, "--vision_backbone", vision_backbone, "--text_backbone", text_backbone),
            *("--data", *corpus.sources, "--eval_data", clean, "--output_dir", output, "--num_train_epochs", 2),
            *("--num_sample_texts", 0, *more),
        ]

    return options


@pytest.fixture(scope="module")
def stage2(trained1, clean):
    def options(corpus: damage.Corpus, output: Path, *more) -> list:
        return [
            *("--stage", 2, "--init_from", trained1, "--lora_r", 4, "--data", *corpus.sources),
            *("--eval_data", clean, "--output_dir", output, "--num_train_epochs", 2, "--num_sample_texts", 0, *more),
        ]

    return options


@pytest.fixture(scope="module")
def trained1(coco, stage1, folder) -> Path:
    output = folder / "stage1"
    run(
        folder / "cache",
        *stage1(
            coco, output, "--max_bad_fraction", 0.9, "--dataloader_num_workers", 2, "--per_device_train_batch_size", 4
        ),
    )
    return output


def test_corpora_hold_the_kinds_of_damage_that_they_promise(coco, llava):
    kinds = {name for corpus in (coco, llava) for name in corpus.damage}
    harmful = set(damage.SKIPPED) | set(damage.SKIPPED_LINES) | set(damage.MENDED)
    harmful |= {name for name, (kind, _) in (damage.CAPTIONS | damage.ENTRIES | damage.LONE_ENTRIES).items() if kind}
    in_images = {name for name, (kind, *_) in damage.IMAGES.items() if kind}
    assert len(harmful) >= 40 and len(in_images) >= 15 and harmful | in_images <= kinds
    assert len(coco.damage) >= 40 and len(llava.damage) >= 40
    assert all(corpus.damage[name] >= 1 for corpus in (coco, llava) for name in corpus.damage)


def test_stage1_survives_a_damaged_coco_and_counts_every_record_once(trained1, coco):
    found = report_of(trained1)
    assert found["skipped"] == dict(coco.skipped)
    assert found["repaired"] == dict(coco.repaired)
    assert found["records"] == coco.records


def test_reports_are_equal_whatever_the_number_of_workers_and_the_size_of_the_batch(trained1, coco, stage1, folder):
    other = folder / "stage1_again"  # with an index that is made anew, and steps in which no image can be read
    options = (
        "--max_bad_fraction",
        0.9,
        "--dataloader_num_workers",
        0,
        "--per_device_train_batch_size",
        1,
        "--gradient_accumulation_steps",
        2,
    )
    done = run(folder / "other_cache", *stage1(coco, other, *options))
    assert (other / "data_report.json").read_bytes() == (trained1 / "data_report.json").read_bytes()
    assert f"{sum(coco.skipped.values()):,} of {coco.records:,} records were skipped:" in done.stdout


def test_two_processes_of_which_one_may_meet_no_image_give_the_report_of_one(trained1, coco, stage1, folder):
    options = ("--max_bad_fraction", 0.9, "--dataloader_num_workers", 0, "--per_device_train_batch_size", 1)
    run(folder / "cache", *stage1(coco, folder / "two", *options), processes=2)
    assert (folder / "two/data_report.json").read_bytes() == (trained1 / "data_report.json").read_bytes()


def test_stage2_survives_damaged_conversations_and_counts_every_record_once_in_every_run(llava, stage2, folder):
    options = ("--max_bad_fraction", 0.9, "--dataloader_num_workers", 2, "--per_device_eval_batch_size", 8)
    for name in ("stage2", "stage2_again"):  # the second finds the index in the cache
        run(folder / "cache", *stage2(llava, folder / name, *options))
        found = report_of(folder / name)
        assert found["skipped"] == dict(llava.skipped)
        assert found["repaired"] == dict(llava.repaired)
        assert found["records"] == llava.records
    assert report_of(folder / "stage2") == report_of(folder / "stage2_again")


def test_a_run_stops_with_one_message_that_counts_if_more_is_bad_than_usual(coco, stage1, folder):
    done = run(folder / "cache", *stage1(coco, folder / "usual", "--dataloader_num_workers", 0), expect=2)
    message = [line for line in done.stderr.splitlines() if "train_accelerate.py: error: " in line]
    bad, share = coco.found_by_reading, coco.found_by_reading / coco.records
    assert message == [
        f"train_accelerate.py: error: {bad:,} of {coco.records:,} records are bad ({share:.2%}), more than "
        "--max_bad_fraction 0.01 allows:"
    ]
    for kind, count in coco.skipped.items():
        assert (f"  skipped {count:,}: {kind} (e.g. " in done.stderr) == (kind not in damage.IMAGE_KINDS), kind
    assert done.stderr.rstrip().endswith("Repair them, or allow more with --max_bad_fraction.")
    assert not (folder / "usual/model.safetensors").exists()


@pytest.mark.parametrize(
    ("what", "kind"), [("a record", "answer is empty"), ("an image, which training finds", "empty image file")]
)
def test_a_strict_run_stops_at_the_first_bad_record(what, kind, stage1, folder):
    home = folder / what.replace(" ", "_")
    (home / "images").mkdir(parents=True)
    damage.write_good_images(home / "images")
    (home / "images/empty.jpg").touch()
    bad = damage.record(99, "<image> x?", "") if what == "a record" else damage.record(99, image="empty.jpg")
    rows = [*(damage.record(number) for number in range(20)), bad]
    (home / "records.json").write_text(json.dumps(rows), encoding="utf-8")
    corpus = damage.Corpus([f"llava:{home}/records.json,images={home}/images"])
    done = run(
        folder / "cache",
        *stage1(corpus, home / "out", "--max_bad_fraction", 0, "--dataloader_num_workers", 0),
        expect=2,
    )
    assert "1 of 21 records are bad (4.76%), more than --max_bad_fraction 0 allows:" in done.stderr
    assert f"  skipped 1: {kind} (e.g. {home}/records.json:20" in done.stderr


# What a reader met nowhere else


def conversation(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_a_link_to_itself_hides_no_other_file_of_its_folder(tmp_path):
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "good.jpg").touch()
    rows = [("1", {"image": "good.jpg", "caption": "x"}), ("2", {"image": "loop.jpg", "caption": "x"})]
    report = Report()
    assert len(list(read_records(rows, MediaFolder(tmp_path).find_value, report))) == 1
    assert report.skipped == Counter({"missing image": 1})


@pytest.mark.parametrize("name", ["caption id", "image id", "key"])
def test_half_a_character_outside_the_texts_can_be_reported(name, tmp_path):
    report, media = Report(), MediaFolder(tmp_path)
    (tmp_path / "good.jpg").touch()
    if name == "key":
        list(read_records([("1", {damage.HALF: 1})], media.find_value, report))
    else:
        ids = [damage.HALF, damage.HALF] if name == "caption id" else [1, 2]
        image_id = damage.HALF if name == "image id" else 7
        content = {
            "images": [{"id": 7, "file_name": "good.jpg"}],
            "annotations": [{"id": each, "image_id": image_id, "caption": "x"} for each in ids],
        }
        (tmp_path / "captions.json").write_text(json.dumps(content), encoding="utf-8")
        list(read_coco_captions(tmp_path / "captions.json", media, report))
    assert report.num_skipped >= 1
    report.table().encode()  # what is printed
    logger = TrainingLogger(tmp_path / "out", 1, True, torch.device("cpu"))
    logger.start(0)
    logger.close(report)
    assert report_of(tmp_path / "out")["skipped"] == dict(report.skipped)


def test_true_is_not_the_id_of_image_1(tmp_path):
    (tmp_path / "good.jpg").touch()
    content = {
        "images": [{"id": 1, "file_name": "good.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": "Its own."},
            {"id": 2, "image_id": True, "caption": "Nobody's."},
            {"id": True, "image_id": 1, "caption": "Its second."},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content), encoding="utf-8")
    report = Report()
    (sample,) = read_coco_captions(tmp_path / "captions.json", MediaFolder(tmp_path), report)
    assert [turn.text for (turn,) in sample.conversations] == ["Its own.", "Its second."]
    assert report.skipped == Counter({"caption without 'image_id'": 1})


def test_a_bad_image_of_a_long_row_is_counted_with_all_its_captions(tmp_path, processor):
    (tmp_path / "empty.jpg").touch()
    captions = [f"Number {number}, of which there is nothing else to be said." for number in range(12)]
    report = Report()
    rows = [("row", {"image": "empty.jpg", "captions": captions})]
    samples = list(read_records(rows, MediaFolder(tmp_path).find_value, report))
    index = make_index(samples, processor, MAX_LENGTH, report)
    assert len(index) > 1, "one tree is too long for all of them"
    dataset = SampleDataset([index], ImageReader(processor))
    for _ in range(2):  # epochs
        report.skip_once([dataset[0, number] for number in range(len(index))])
    assert report.records == 12 and report.skipped == Counter({"empty image file": 12})


def test_a_name_of_many_folders_takes_no_memory(tmp_path):
    media, report = MediaFolder(tmp_path), Report()
    list(read_records([("1", {"image": "a/" * 20_000 + "b.jpg", "caption": "x"})], media.find_value, report))
    assert report.skipped == Counter({"image name is not valid": 1})
    assert sum(map(len, [*media.folders, *media._archives])) < 1_000_000


@pytest.mark.parametrize(
    ("name", "share"), [("about.json", 0), ("about.json", 0.5), ("index.arrow", None), ("index.arrow", 0.5)]
)
def test_a_damaged_cache_is_made_anew(name, share, tmp_path, processor, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    damage.write_good_images(tmp_path)
    (tmp_path / "records.json").write_text(json.dumps([damage.record(0), damage.record(1)]), encoding="utf-8")
    source = parse_source(f"llava:{tmp_path}/records.json")
    made = load_index(source, processor, MAX_LENGTH)
    samples, report = [made.sample(number) for number in range(2)], made.report
    del made  # before the file under it changes
    (path,) = (tmp_path / "cache").rglob(name)
    if share is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    again = load_index(source, processor, MAX_LENGTH)
    assert [again.sample(number) for number in range(2)] == samples and again.report == report


# Anything at all


@pytest.fixture
def media(tmp_path) -> MediaFolder:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(damage.JPEG)
    return MediaFolder(tmp_path)


def check(samples, processor, report: Report) -> Index:
    """All become token ids or are counted. Returns the index of them."""
    index = make_index(samples, processor, MAX_LENGTH, report)
    kept = sum(index.num_conversations(number) for number in range(len(index)))
    assert report.records == kept + report.num_skipped, report.table()
    assert index.num_tokens().max(initial=0) <= MAX_LENGTH
    for number in range(len(index)):
        assert index.shared_prefix_sample(number).shift_labels, "a sample that teaches nothing"
        assert len(index.sample(number).conversations) == index.num_conversations(number)
    json.dumps(report.as_dict())
    return index


@pytest.mark.parametrize("group", [True, False])
def test_10_000_mutated_records_are_used_or_counted_and_nothing_is_raised(group, media, processor):
    chance, valid, report = random.Random(int(group)), damage.valid_rows(["a.jpg", "b.jpg"]), Report()
    rows = [(f"row:{number}", damage.mutated(valid[number % len(valid)], chance)) for number in range(10_000)]
    index = check(read_records(rows, media.find_value, report, group), processor, report)
    assert report.records >= 10_000 and len(report.skipped) >= 40 and sum(report.repaired.values()) >= 30
    assert 2000 < sum(index.num_conversations(number) for number in range(len(index))) < 8000, report.table()


def test_mutated_lines_are_used_or_counted_and_nothing_is_raised(media, processor, tmp_path):
    chance, valid = random.Random(1), damage.valid_rows(["a.jpg", "b.jpg"])
    lines = [json.dumps(valid[number % len(valid)]).encode() for number in range(3000)]
    lines = [damage.mutated_line(line, chance) if chance.random() < 0.9 else line for line in lines]
    lines = [line for line in lines if line.strip()]
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join(lines))
    report = Report()
    check(read_instruct(tmp_path / "lines.jsonl", media, report), processor, report)
    assert report.skipped["line is not json"] > 1000
    assert report.records >= len(lines)


@pytest.mark.parametrize("seed", range(20))
def test_2_000_mutated_coco_records_are_used_or_counted_and_nothing_is_raised(seed, media, processor, tmp_path):
    chance = random.Random(seed)
    images = [{"id": number, "file_name": "ab"[number % 2] + ".jpg", "height": 9} for number in range(20)]
    captions = [{"id": number, "image_id": number % 20, "caption": f"Number {number}."} for number in range(80)]
    content = {name: _some_mutated(rows, chance) for name, rows in (("images", images), ("annotations", captions))}
    (tmp_path / "captions.json").write_text(json.dumps(content), encoding="utf-8")
    report = Report()
    check(read_coco_captions(tmp_path / "captions.json", media, report), processor, report)
    lone = sum(report.skipped[kind] for kind in ("image without 'id'", "duplicate image id"))
    assert report.records == len(content["annotations"]) + lone


@pytest.mark.parametrize("seed", range(20))
def test_mutated_karpathy_and_vqa_records_are_used_or_counted_and_nothing_is_raised(seed, media, processor, tmp_path):
    chance = random.Random(seed)
    said = [{"raw": "A circle.", "tokens": ["a"]}, {"raw": "Red."}]
    images = [
        {"filepath": "", "filename": "a.jpg", "cocoid": number, "split": "train", "sentences": said}
        for number in range(60)
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": _some_mutated(images, chance)}), encoding="utf-8")
    report = Report()
    check(read_karpathy_split(tmp_path / "karpathy.json", media, "train", report), processor, report)

    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014/COCO_val2014_000000000001.jpg").touch()
    questions = [{"question_id": number, "image_id": 1, "question": f"{number}?"} for number in range(60)]
    answers = [{"question_id": number, "answers": [{"answer": "yes"}, {"answer": "no"}]} for number in range(60)]
    for name, key, rows in (("questions", "questions", questions), ("answers", "annotations", answers)):
        (tmp_path / f"{name}.json").write_text(json.dumps({key: _some_mutated(rows, chance)}), encoding="utf-8")
    report = Report()
    samples = read_vqa(tmp_path / "questions.json", tmp_path / "answers.json", MediaFolder(tmp_path), report)
    check(samples, processor, report)
    assert report.records == 60


def _some_mutated(rows: list, chance: random.Random) -> list:
    rows = [damage.mutated(row, chance) if chance.random() < 0.7 else row for row in rows]
    chance.shuffle(rows)
    return rows


def test_every_layout_stands_in_the_index_as_it_was_read(media, processor):
    for row in damage.valid_rows(["a.jpg", "b.jpg"]):
        (sample,) = read_records([("origin", row)], media.find_value, Report())
        index = make_index([sample], processor, MAX_LENGTH)
        assert index.sample(0) == sample
        assert [len(conversation.ids) > 0 for conversation in index.encoded(0)] == [True] * len(sample.conversations)
