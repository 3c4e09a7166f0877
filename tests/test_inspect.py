import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clip_phi.batching.dataset import ImageReader, SampleDataset
from clip_phi.batching.index import load_index
from clip_phi.cli import main
from clip_phi.data.report import Skip
from clip_phi.data.source import parse_source
from clip_phi.data.synthetic import write_dataset
from clip_phi.tools import inspect as inspection
from modeling_clip_phi import ClipPhiConfig

ROOT = Path(__file__).parent.parent
LONG = "a red circle and a blue square " * 40


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture(scope="module")
def checkpoint(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    return str(folder)


def record(image, *turns, first="<image>\n"):
    messages = [
        {"from": "gpt" if place % 2 else "human", "value": ("" if place or not image else first) + text}
        for place, text in enumerate(turns)
    ]
    return {"conversations": messages} | ({"image": image} if image else {})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawn images 1 to 4 (5 and 6 are for validation), conversations of which some are damaged, and copies."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num_train=4, num_val=2)
    train, val = folder / "train2017", folder / "val2017"
    one, two, four = (f"{number:012d}.jpg" for number in (1, 2, 4))
    Image.open(train / two).save(train / "copy.png")
    (train / "cut.jpg").write_bytes((train / four).read_bytes()[:-900])
    (train / "empty.jpg").touch()
    wrong = record(one, "a star?", "yes")
    wrong["conversations"].append({"from": "gpt", "value": "no"})
    records = [
        record(one, "a red circle?", "yes"),  # 0
        record(one, "a star?", "no", "What\nelse?", "a ring"),
        record(two, "which animal?", "café 猫"),
        record("copy.png", "a ring?", "no"),
        record("nowhere.jpg", "a ring?", "no"),
        record("cut.jpg", "a ring?", "no"),  # 5
        record("cut.jpg", "a star?", "yes"),
        record("empty.jpg", "a star?", "yes"),
        record(None, "\033[31m<script>alert(1)</script> & $a$?", "no"),
        record(two, "describe", LONG),
        record(four, "a star?", "yes", "and?", LONG),  # 10
        wrong,
        record(one, "a red circle?", "yes"),
    ]
    (folder / "mixed.json").write_text(json.dumps(records))
    shutil.copy(train / one, val / "leaked.jpg")
    (val / "empty.jpg").touch()
    held_out = [record(name, "a ring?", "no") for name in ("leaked.jpg", "000000000005.jpg", "empty.jpg")]
    (folder / "val.json").write_text(json.dumps(held_out))
    return folder


@pytest.fixture
def mixed(data):
    return f"llava:{data}/mixed.json,images={data}/train2017"


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Returns what was printed; with json=True, the bytes of the json file."""

    def call(*options, json=False, expect=0):
        options = [*map(str, options), "--model", checkpoint, "--max_length", "100", "--num_workers", "0"]
        file = tmp_path / "summary.json"
        capsys.readouterr()
        assert main(["inspect", *options, *(["--output", str(file)] if json else [])]) == expect
        printed = capsys.readouterr()
        return file.read_bytes() if json else printed.err if expect else printed.out

    return call


def count_tokens(processor, text):
    return len(processor.tokenizer(text)["input_ids"])


def test_a_sample_is_shown_as_its_tokens_with_what_is_supervised_between_brackets(run, mixed, data, processor):
    prompts = ["Instruct: a red circle?\nOutput:", "Instruct: a star?\nOutput:", "Instruct: What\nelse?\nOutput:"]
    answers = [f" {text}<|endoftext|>" for text in ("yes", "no", "a ring")]
    supervised = sum(count_tokens(processor, text) for text in answers)
    tokens = 4 + sum(count_tokens(processor, text) for text in prompts) + supervised
    assert run(mixed) == (
        "sample 0 of 7\n"
        f"image: {data}/train2017/000000000001.jpg, 64 x 64 pixels\n"
        f"{tokens} tokens, {supervised} of them supervised ({supervised / tokens:.1%})\n"
        f"- {data}/mixed.json:0\n"
        "<image>×4Instruct: a red circle?⏎\nOutput:⟦ yes<|endoftext|>⟧\n"
        f"- {data}/mixed.json:1\n"
        "<image>×4Instruct: a star?⏎\nOutput:⟦ no<|endoftext|>⟧"
        "Instruct: What⏎\nelse?⏎\nOutput:⟦ a ring<|endoftext|>⟧\n\n"
    )


def test_on_a_terminal_what_is_supervised_is_bold_and_green_unless_no_color_is_set(run, mixed, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = "<image>×4Instruct: which animal?⏎\nOutput:{} café 猫<|endoftext|>{}\n"
    assert shown.format("\033[1;32m", "\033[0m") in run(mixed, "--sample", 1)
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown.format("⟦", "⟧") in run(mixed, "--sample", 1)


def test_several_samples_go_on_into_the_next_source_and_a_bad_image_is_told(run, mixed, data, processor):
    lines = run(mixed, data, "--sample", 3, "--num", 5).splitlines()
    total = 7 + len(load_index(parse_source(str(data)), processor, 100))
    titles = [line for line in lines if line.startswith("sample")]
    assert titles == [f"sample {number} of {total}" for number in range(3, 8)]
    pictures = [line.removeprefix("image: ") for line in lines if line.startswith("image: ")]
    assert pictures[0].startswith(f"damaged image: {data}/train2017/cut.jpg")
    assert pictures[1:] == [
        f"empty image file: {data}/train2017/empty.jpg (training skips this sample)",
        "no image",
        f"{data}/train2017/000000000004.jpg, 64 x 64 pixels",
        f"{data}/train2017/000000000001.jpg, 64 x 64 pixels",
    ]


def test_a_text_cannot_command_the_terminal(run, mixed):
    shown = run(mixed, "--sample", 5)
    assert "\nInstruct: \\x1b[31m<script>alert(1)</script> & $a$?⏎\n" in shown and "\033" not in shown


def test_json_counts_what_is_used_skipped_mended_equal_and_leaked(run, mixed, data, checkpoint):
    val = f"llava:{data}/val.json,images={data}/val2017"
    summary = json.loads(run(mixed, "--eval_data", val, json=True))
    tokens = {key: summary.pop(key) for key in ("tokens", "supervised_tokens", "share_supervised", "lengths")}
    examples = summary.pop("examples")
    train = f"{data}/train2017"
    assert summary == {
        "data": [mixed],
        "val": [val],
        "processor": checkpoint,
        "max_length": 100,
        "sources": [
            {"data": mixed, "records": 13, "skipped": 7, "samples": 5, "kind": "llava", "images": 4, "conversations": 6}
        ],
        "records": 13,
        "conversations": 6,
        "samples": 5,
        "images": 4,
        "turns": 14,
        "skipped": {
            "damaged image": 2,
            "duplicate record": 1,
            "empty image file": 1,
            "longer than max_length": 1,
            "missing image": 1,
            "two answers in a row": 1,
        },
        "repaired": {"longer than max_length, and was cut after an answer": 1},
        "duplicates": {"images": 1, "samples": 1, "examples": [f"{train}/copy.png = {train}/000000000002.jpg"]},
        "leakage": {
            "images": 1,
            "val_images": 2,
            "unreadable": 1,
            "examples": [f"{data}/val2017/leaked.jpg = {train}/000000000001.jpg"],
            "look_alikes": 0,
            "look_alike_examples": [],
            "same_ids": 0,
            "same_id_examples": [],
        },
    }
    assert summary["records"] == summary["conversations"] + sum(summary["skipped"].values())
    assert examples["empty image file"] == [f"{data}/mixed.json:7: {train}/empty.jpg"]
    assert examples["duplicate record"] == [f"{data}/mixed.json:12"]
    assert examples["damaged image"][0].startswith(f"{data}/mixed.json:5: {train}/cut.jpg: ")
    assert set(examples) == set(summary["skipped"]) | set(summary["repaired"])
    assert tokens["share_supervised"] == round(tokens["supervised_tokens"] / tokens["tokens"], 4)
    assert sum(tokens["lengths"]["histogram"].values()) == 5


def test_the_numbers_are_those_that_training_meets(run, mixed, data, processor):
    summary = json.loads(run(mixed, data, json=True))
    indexes = [load_index(parse_source(text), processor, 100) for text in (mixed, str(data))]
    dataset = SampleDataset(indexes, ImageReader(processor))
    items = [dataset[0, place] for place in range(len(dataset))]
    skips = [item for item in items if isinstance(item, Skip)]
    trees = [item[0] for item in items if not isinstance(item, Skip)]
    assert {skip.kind: skip.records for skip in skips} == {"damaged image": 2, "empty image file": 1}
    assert {kind: summary["skipped"][kind] for kind in ("damaged image", "empty image file")} == {
        skip.kind: skip.records for skip in skips
    }
    conversations = [len(set(tree.conversation_ids) - {0}) for tree in trees]
    # A branch's last token is a target but no input.
    lengths = sorted(len(tree.input_ids) + count for tree, count in zip(trees, conversations, strict=True))
    assert summary["conversations"] == sum(conversations)
    assert (summary["samples"], summary["tokens"]) == (len(trees), sum(lengths))
    assert summary["supervised_tokens"] == sum(len(tree.shift_labels) for tree in trees)
    assert (summary["lengths"]["min"], summary["lengths"]["max"]) == (lengths[0], lengths[-1])
    assert summary["lengths"]["mean"] == round(sum(lengths) / len(lengths), 2)
    assert summary["images"] == 5 and summary["duplicates"]["images"] == 1
    assert summary["duplicates"]["samples"] == sum(tree.conversation_ids[0] == 0 for tree in trees) - 4


def test_lengths_are_described_exactly():
    lengths = [7, 7, 8, 30, *[10] * 16]
    assert inspection.describe_lengths(inspection.np.array(lengths)) == {
        "min": 7,
        "median": 10.0,
        "mean": 10.6,
        "p95": 10,
        "max": 30,
        "histogram": {"7-9": 3, "10-12": 16, "13-15": 0, "16-18": 0, "19-21": 0, "22-24": 0, "25-27": 0, "28-30": 1},
    }


def test_two_runs_and_any_number_of_workers_write_equal_bytes(run, mixed, data, monkeypatch):
    monkeypatch.setattr(inspection, "CHUNK", 2)
    monkeypatch.setattr(inspection, "WINDOW", 2)
    options = (mixed, data, "--eval_data", f"llava:{data}/val.json,images={data}/val2017")
    first = run(*options, json=True)
    assert run(*options, json=True) == first
    monkeypatch.setattr(
        inspection, "check_images", lambda images, workers, real=inspection.check_images: real(images, 2)
    )
    assert run(*options, json=True) == first


def test_the_summary_is_a_table_with_the_first_examples_of_each_kind(run, mixed, data):
    val = f"llava:{data}/val.json,images={data}/val2017"
    rows = [" ".join(line.split()) for line in run(mixed, "--summary", "--eval_data", val).splitlines()]
    assert rows[:6] == [
        f"data {mixed}: 4 images, 6 conversations, 7 records skipped",
        "records 13",
        "conversations 6",
        "samples 5",
        "images 4",
        "turns 14",
    ]
    place = rows.index("skipped 7")
    assert rows[place + 1] == "2 damaged image" and rows[place + 2].startswith(f"{data}/mixed.json:5: ")
    assert rows[place + 3 : place + 5] == ["1 duplicate record", f"{data}/mixed.json:12"]
    assert "repaired 1" in rows
    assert rows[-3:] == [
        "leakage 1 of 2 validation images are trained on",
        f"{data}/val2017/leaked.jpg = {data}/train2017/000000000001.jpg",
        "1 more cannot be read",
    ]


def test_recompressed_copies_and_equal_numbers_of_coco_are_found_among_the_validation_images(run, data, tmp_path):
    drawn = tmp_path / "drawn"
    write_dataset(drawn, num_train=30, num_val=12)
    train, val = drawn / "train2017", drawn / "val2017"
    for number, quality, size in ((1, 75, 64), (2, 50, 64), (3, 90, 128)):
        with Image.open(train / f"{number:012d}.jpg") as image:
            image.resize((size, size)).save(val / f"copy{number}.jpg", quality=quality)
    Image.effect_noise((64, 64), 90).convert("RGB").save(val / "COCO_val2014_000000000004.jpg")
    names = [f"copy{number}.jpg" for number in (1, 2, 3)] + ["COCO_val2014_000000000004.jpg"]
    names += [path.name for path in sorted(val.glob("0*.jpg"))]
    (tmp_path / "val.json").write_text(json.dumps([record(name, "a ring?", "no") for name in names]))
    held_out = f"llava:{tmp_path}/val.json,images={val}"
    found = json.loads(run(drawn, "--eval_data", held_out, json=True))["leakage"]
    assert (found["val_images"], found["images"], found["look_alikes"], found["same_ids"]) == (16, 0, 3, 1)
    assert found["look_alike_examples"] == [f"{val}/copy{n}.jpg = {train}/{n:012d}.jpg" for n in (1, 2, 3)]
    assert found["same_id_examples"] == [f"{val}/COCO_val2014_000000000004.jpg = {train}/000000000004.jpg"]
    rows = [" ".join(line.split()) for line in run(drawn, "--eval_data", held_out).splitlines()]
    assert "3 more look like an image that is" in rows and "1 more have the number of an image that is" in rows


def test_html_is_one_escaped_page_with_pictures_and_highlighted_answers(run, mixed, data, tmp_path):
    file = tmp_path / "page.html"
    assert run(mixed, "--output", file, "--num", 6) == ""
    page = file.read_text(encoding="utf-8")
    assert "<mark> yes&lt;|endoftext|&gt;</mark>" in page and "<mark> café 猫&lt;|endoftext|&gt;</mark>" in page
    assert "&lt;image&gt;×4Instruct: a red circle?⏎\nOutput:" in page
    assert "\\x1b[31m&lt;script&gt;alert(1)&lt;/script&gt; &amp; $a$?" in page and "<script" not in page
    assert len(re.findall('<img src="data:image/jpeg;base64,/9j/', page)) == 3  # two are damaged, one is text
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<table>" not in page
    run(mixed, "--output", file, "--summary")
    assert "<tr><td>skipped</td><td>7</td></tr>" in file.read_text(encoding="utf-8")


def test_a_large_picture_becomes_a_small_one_in_the_page(run, tmp_path):
    Image.new("RGB", (900, 600), "red").save(tmp_path / "large.png")
    (tmp_path / "data.json").write_text(json.dumps([record("large.png", "a ring?", "no")]))
    run(tmp_path / "data.json", "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "large.png, 900 x 600 pixels" in page
    uri = re.search('data:image/jpeg;base64,([^"]+)"', page)[1]
    picture = Image.open(io.BytesIO(base64.b64decode(uri)))
    assert picture.size == (256, 171)


def test_png_is_drawn_though_images_are_damaged_and_texts_hold_dollars(run, mixed, tmp_path):
    assert run(mixed, "--output", tmp_path / "sheet.png", "--num", 50) == ""
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_data_of_which_nothing_can_be_used_are_still_summarised_and_drawn(run, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps([record("none.jpg", "a ring?", "no")]))
    bad = tmp_path / "bad.json"
    assert "no sample can be used, of 1 records: skipped 1: missing image" in run(bad, expect=2)
    files = [f"--output={tmp_path}/out.{kind}" for kind in ("html", "png")]
    run(bad, "--eval_data", bad, *files, f"--output={tmp_path}/out.json", expect=2)
    summary = json.loads((tmp_path / "out.json").read_text())
    assert (summary["records"], summary["skipped"]) == (1, {"missing image": 1})
    assert summary["lengths"] is None and summary["share_supervised"] == 0 and summary["images"] == 0
    assert (tmp_path / "out.html").stat().st_size and (tmp_path / "out.png").stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/nowhere/x.json"], "no such file: /nowhere/x.json"),
        (["coco:/nowhere/x.json"], "not found (looked in"),
        (["dataset:user/name,streaming=true"], "remove streaming=true from dataset:user/name,streaming=true"),
        (["{mixed}", "--sample", "7"], "--sample 7: there are 7 samples, from 0 on"),
        (["{mixed}", "--output", "/nowhere/summary.json"], "no folder for /nowhere/summary.json"),
        (["{mixed}", "--eval_data", "dataset:user/name,streaming=true"], "remove streaming=true"),
    ],
)
def test_bad_input_is_one_line_with_status_2(options, message, mixed, run):
    error = run(*(option.format(mixed=mixed) for option in options), expect=2).splitlines()[-1]
    assert error.startswith("clip-phi: error: ") and message in error


def test_a_checkpoint_that_holds_no_processor_is_named(mixed, text_backbone, capsys):
    assert main(["inspect", mixed, "--model", text_backbone]) == 2
    assert f"error: --model {text_backbone} is no Clip-Phi processor" in capsys.readouterr().err


def test_the_tokenizer_is_the_demos_or_else_the_shipped_one_and_is_told(
    mixed, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", mixed]) == 0
    shipped = ROOT / "examples/demo_backbones/text"
    assert capsys.readouterr().err.splitlines() == [
        f"tokenizer: {shipped} (--model chooses another)",
        "--max_length is cut to the decoder's context, 512, as it is in training",
    ]
    shutil.copytree(checkpoint, "outputs/demo/model")
    ClipPhiConfig().save_pretrained("outputs/demo/model")
    assert main(["inspect", mixed]) == 0
    assert capsys.readouterr().err == "tokenizer: outputs/demo/model (--model chooses another)\n"
    shutil.rmtree("outputs")
    monkeypatch.setattr(inspection, "DEMO_BACKBONES", tmp_path / "none")
    assert main(["inspect", mixed]) == 2
    assert "name a tokenizer with --model" in capsys.readouterr().err


def test_help_imports_no_torch():
    script = (
        "import sys\nfrom clip_phi.cli import main\n"
        "try:\n    main(['inspect', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--max_length" in done.stdout, done.stderr
