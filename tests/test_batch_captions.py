"""clip-phi caption on folders: every image has its line, bad ones are counted, a stopped run is continued."""

import json
import os
import random

import pytest
from fork_server import run_forked
from PIL import Image

from clip_phi.batching import images as image_formats
from clip_phi.cli import main
from clip_phi.evaluation.generate import generate_texts
from clip_phi.serving import batch_captions
from clip_phi.serving.engine import as_prompt


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """70 images in two folders, three bad ones, and a file that is no image."""
    path = tmp_path_factory.mktemp("images")
    (path / "more").mkdir()
    for number in range(70):
        noise = random.Random(number).randbytes(40 * 30 * 3)
        Image.frombytes("RGB", (40, 30), noise).save(path / ("more" if number % 3 else "") / f"{number:02}.png")
    (path / "99.png").write_bytes(b"")
    (path / "98.JPG").write_text("no image")
    (path / "more/97.png").write_bytes((path / "more/01.png").read_bytes()[:200])
    (path / "notes.txt").write_text("not asked for")
    return path


@pytest.fixture(scope="module")
def captions(images, model, processor):
    prompts = {}
    for path in sorted(images.rglob("[0-8]*.png")):
        image = Image.open(path).convert("RGB")
        prompts[str(path)] = (as_prompt(None, image)[0], image)
    return dict(zip(prompts, generate_texts(model, processor, list(prompts.values()), 6), strict=True))


def run(capsys, checkpoint, *arguments):
    status = main(["caption", *map(str, arguments), "--model", checkpoint, "--max_new_tokens", "6"])
    return status, capsys.readouterr()


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_every_image_of_a_folder_has_its_line_in_order(images, captions, checkpoint, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    status, printed = run(capsys, checkpoint, images, "--output", output)
    found = records(output.read_text())
    assert status == 1 and printed.out == ""  # some are bad
    names = [record["image"] for record in found]
    assert len(found) == 73 and names == sorted(
        map(str, [p for p in images.rglob("*") if p.suffix in (".png", ".JPG")])
    )
    assert {record["image"]: record["caption"] for record in found if "caption" in record} == captions
    assert "3 bad: " in printed.err and "1 empty image file" in printed.err and "captioned 70 images" in printed.err
    assert "images and" in printed.err and "tokens per second" in printed.err
    assert f"{images}: 1 files are left out, which are no images by their names: 1 x .txt" in printed.err
    errors = [record["error"] for record in found if "error" in record]
    assert len(errors) == 3 and all(error in printed.err for error in errors)


def test_files_that_are_left_out_are_counted_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_formats, "has_heif", lambda: False)
    for name in ("a.heic", "b.HEIC", "notes.txt", ".DS_Store", "more/c.\x1b[2Jx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"no image in .*5 files are left out.*2 x \.heic.*clip-phi\[photos\]"):
        batch_captions.find_images([str(tmp_path)])
    (tmp_path / "d.png").touch()
    assert batch_captions.find_images([str(tmp_path)]) == [str(tmp_path / "d.png")]
    err = capsys.readouterr().err
    assert "2 x .heic" in err and "1 x no ending" in err and "1 x .txt" in err
    assert "\x1b" not in err and "\\x1b[2jx" in err and "pip install 'clip-phi[photos]'" in err


def test_without_a_file_the_lines_are_printed(images, captions, checkpoint, capsys):
    status, printed = run(capsys, checkpoint, images / "more")
    assert status == 1 and sum("caption" in record for record in records(printed.out)) == 46


def test_a_stopped_run_is_continued_and_bad_images_are_tried_again(
    images, captions, checkpoint, tmp_path, capsys, monkeypatch
):
    output, opened = tmp_path / "captions.jsonl", []
    run(capsys, checkpoint, images, "--output", output)
    whole = output.read_text()
    lines = [line for line in whole.splitlines() if "caption" in line]
    output.write_text(
        "\n".join(lines[:30])
        + "\n"
        + json.dumps({"image": str(images / "99.png"), "error": "old"})
        + "\n"
        + lines[30][:20]
    )
    load = batch_captions.load_image
    monkeypatch.setattr(batch_captions, "load_image", lambda name: opened.append(name) or load(name))
    status, printed = run(capsys, checkpoint, images, "--output", output)
    assert status == 2 and "exists already: --resume continues it" in printed.err and not opened
    status, printed = run(capsys, checkpoint, images, "--output", output, "--resume")
    assert status == 1 and "30 were done before" in printed.err and len(opened) == 43
    found = records(output.read_text())
    assert len(found) == 73 and {r["image"]: r["caption"] for r in found if "caption" in r} == captions
    assert output.read_text().splitlines()[:30] == lines[:30] and not list(tmp_path.glob(".*"))


END_AT_60 = """
import os, sys
from clip_phi.cli import main
from clip_phi.serving import batch_captions

load, count = batch_captions.load_image, iter(range(60))
batch_captions.load_image = lambda name: load(name) if next(count, None) is not None else os._exit(9)
main(sys.argv[1:])
"""


def test_a_killed_run_leaves_whole_lines_but_the_last(images, captions, checkpoint, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    (tmp_path / "script.py").write_text(END_AT_60)
    words = ["caption", images, "--output", output, "--model", checkpoint, "--max_new_tokens", "6"]
    assert run_forked(tmp_path / "script.py", words, tmp_path, dict(os.environ)).returncode == 9
    run(capsys, checkpoint, images, "--output", output, "--resume")
    assert {r["image"]: r["caption"] for r in records(output.read_text()) if "caption" in r} == captions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "no image in"),
        (["{empty}/none.png", "--output", "x"], "there is no such file or folder"),
        (["a.png", "--resume"], "--resume requires --output FILE"),
    ],
)
def test_bad_requests_are_one_line(arguments, message, checkpoint, tmp_path, capsys):
    status, printed = run(capsys, checkpoint, *(each.format(empty=tmp_path) for each in arguments))
    assert status == 2 and message in printed.err.splitlines()[-1]
