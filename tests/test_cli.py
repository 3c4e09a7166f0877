import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
from PIL import Image

from clip_phi.cli import main
from clip_phi.commands.common import COMMANDS, OPTIONS, choose_model
from clip_phi.data.report import plain
from clip_phi.evaluation.generate import generate_texts
from clip_phi.evaluation.run import load


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return str(path)


def expected(model, processor, path, text=None, max_new_tokens=6):
    content = [{"type": "image"}] + ([{"type": "text", "text": text}] if text else [])
    prompts = [([{"role": "user", "content": content}], Image.open(path).convert("RGB"))]
    return generate_texts(model, processor, prompts, max_new_tokens)[0]


def shown(*arguments) -> str:
    """As the terminal gets it."""
    return plain(expected(*arguments))


def test_caption_and_ask_print_the_greedy_text_of_the_model(model, processor, checkpoint, image, capsys):
    options = ["--model", checkpoint, "--max_new_tokens", "6"]
    assert main(["caption", image, *options]) == 0
    assert capsys.readouterr().out.strip() == shown(model, processor, image)
    assert main(["ask", image, "a circle?", *options]) == 0
    assert capsys.readouterr().out.strip() == shown(model, processor, image, "a circle?")


def test_json_is_one_object_an_image(model, processor, checkpoint, image, capsys):
    options = ["--model", checkpoint, "--max_new_tokens", "6", "--json"]
    assert main(["caption", image, image, *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"image": image, "caption": expected(model, processor, image)}] * 2
    assert main(["ask", image, "a star?", *options]) == 0
    answer = expected(model, processor, image, "a star?")
    assert json.loads(capsys.readouterr().out) == {"image": image, "question": "a star?", "answer": answer}


def test_caption_asks_as_the_checkpoint_was_trained_to_be_asked(checkpoint, model, processor, image, tmp_path, capsys):
    folder = tmp_path / "stage2"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"caption_instruction": "a red circle"}))
    assert main(["caption", image, "--model", str(folder), "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out.strip() == shown(model, processor, image, "a red circle")


def test_draw_data_writes_the_same_files_for_the_same_seed(tmp_path, capsys):
    for name in ("one", "two"):
        folder = str(tmp_path / name)
        assert main(["draw-data", folder, "--num_train", "3", "--num_val", "2", "--seed", "5", "--json"]) == 0
        written = json.loads(capsys.readouterr().out)
        assert written == {"folder": folder, "num_train": 3, "num_val": 2, "seed": 5}
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 11
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["caption", "none.png"], "missing image: none.png"),
        (["caption", "README.md"], "not an image: README.md"),
        (["caption", "{image}", "--model", "/nowhere/model"], "no model /nowhere/model"),
        (["caption", "{image}", "--model", "{text}"], "holds a 'phi' model, not a 'clip_phi' one"),
        (
            ["ask", "{image}", "why?", "--model", "{checkpoint}", "--max_new_tokens", "5000"],
            "do not fit the context",
        ),
        (["ask", "{image}", "an <image>?", "--model", "{checkpoint}"], "<image>"),
        (
            ["evaluate", "{checkpoint}", "--task", "loss", "--data", "x", "--meteor"],
            "--meteor requires --task captions",
        ),
        (
            ["evaluate", "{checkpoint}", "--task", "vqa", "--data", "x", "--clip", "x/y"],
            "--clip requires --task captions",
        ),
        (["evaluate", "{checkpoint}", "--task", "loss", "--data", "x", "--num_beams", "2"], "not loss"),
        (["evaluate", "{checkpoint}", "--task", "loss", "--data", "x", "--prompt", ""], "--prompt requires --task"),
        (["evaluate", "{checkpoint}", "--task", "pointing", "--data", "x", "--shuffles", "2"], "not pointing"),
    ],
)
def test_bad_input_is_one_line_with_status_2(argv, message, image, checkpoint, text_backbone, capsys):
    names = {"image": image, "checkpoint": checkpoint, "text": text_backbone}
    assert main([part.format(**names) for part in argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("clip-phi: error: ") and message in error


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[" * 100_000, "config.json is not json"),
        ("[]", "config.json is not a json object"),
        ('{"text_config": {"num_hidden_layers": 1000000000}}', "num_hidden_layers 1000000000: at most 1000"),
        ('{"vision_config": {"num_hidden_layers": -1}}', "num_hidden_layers -1: at most 1000"),
    ],
)
def test_a_hostile_config_is_one_line_before_anything_is_made_of_it(config, message, image, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    assert main(["caption", image, "--model", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="missing image: none.png"):
        main(["caption", "none.png", "--debug"])


def test_each_command_has_a_function_and_each_group_of_options_a_command():
    table = COMMANDS | COMMANDS["speech"]["actions"]
    commands = {name: about for name, about in table.items() if "actions" not in about}
    assert len(commands) == len(table) - 1 > 10
    for name, about in commands.items():
        module = import_module(f"clip_phi.commands.{about['module']}")
        assert callable(getattr(module, f"run_{name.replace('-', '_')}")), name
    assert {group for about in commands.values() for group in about["options"]} == OPTIONS.keys()


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    words = f"draw-data {tmp_path} --num_train 1 --num_val 1"
    command = f"{sys.executable} -m clip_phi.cli {words} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "0", "")


def test_without_the_demo_the_default_checkpoint_says_how_to_get_it(image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["caption", image]) == 2
    assert "run 'make demo' first, or give --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["captoin", "a.png"], "clip-phi: error: unknown command captoin; the nearest known one is caption"),
        (
            ["caption", "a.png", "--modle", "x"],
            "clip-phi caption: error: unknown option --modle; the nearest known one is --model",
        ),
        (
            ["speech", "transcibe", "a.wav"],
            "clip-phi speech: error: unknown command transcibe; the nearest known one is transcribe",
        ),
        (["speech", "dataset", "a.json", "--out=b.json"], "unknown option --out; the nearest known one is --output"),
        (["plan"], "clip-phi plan: error: the following arguments are required: --gpu"),
        (["--version"], "clip-phi: error: unknown option --version"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest_known_one(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--gpu", "t4", "--mfu", "2"], "--mfu: must be more than 0 and at most 1, not 2"),
        (["plan", "--gpu", "t4", "--mfu", "nan"], "--mfu: must be more than 0 and at most 1, not nan"),
        (["evaluate", "--task", "loss", "--max_bad_fraction", "nan"], "must be at least 0 and less than 1, not nan"),
        (["evaluate", "--task", "loss", "--max_bad_fraction", "-1"], "must be at least 0 and less than 1, not -1"),
        (["evaluate", "--task", "loss", "--seed", "-1"], "--seed: must be at least 0, not -1"),
        (["compare", "a", "b", "--seed", "-1"], "--seed: must be at least 0, not -1"),
    ],
)
def test_a_number_without_meaning_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_a_device_that_is_not_there_is_one_line(image, checkpoint, capsys):
    for device in ("nope", "cuda:77"):  # which no machine has
        assert main(["caption", image, "--model", checkpoint, "--device", device]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"clip-phi: error: --device {device}: ") and error.count("\n") == 1
        with pytest.raises(ValueError, match=f"--device {device}: "):
            load(checkpoint, device)


def test_arguments_and_options_come_in_any_order(image, checkpoint, model, processor, capsys):
    answer = expected(model, processor, image, "a star?")
    words = [["--model", checkpoint], [image], ["--max_new_tokens", "6"], ["a star?"]]
    for order in ((0, 1, 2, 3), (1, 0, 3, 2), (1, 3, 0, 2)):
        assert main(["ask", *(word for place in order for word in words[place])]) == 0
        assert capsys.readouterr().out.strip() == plain(answer)
    assert main(["ask", image, "--model", checkpoint, "--max_new_tokens", "6", "--", "--why?"]) == 0
    assert capsys.readouterr().out.strip() == shown(model, processor, image, "--why?")


def test_the_default_model_is_the_newest_and_is_named(checkpoint, image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("outputs/demo/model", "outputs/stage1")):
        shutil.copytree(checkpoint, name)
        os.utime(f"{name}/config.json", (1000 - age, 1000 - age))
    assert main(["caption", image, "--max_new_tokens", "1"]) == 0
    assert capsys.readouterr().err.splitlines()[0] == "clip-phi: model: outputs/demo/model (--model chooses another)"
    os.utime("outputs/stage1/config.json")
    assert choose_model(argparse.Namespace(model=None, model_argument=None)) == "outputs/stage1"


@pytest.mark.parametrize(
    "command",
    [
        ["export", "{model}", "out", "--to", "onnx"],
        ["serve", "{model}"],
        ["chat", "{model}"],
        ["evaluate", "{model}", "--task", "vqa"],
        ["push", "{model}", "user/name"],
    ],
)
def test_a_model_given_twice_is_refused(command, capsys):
    assert main([*(word.format(model="a/b") for word in command), "--model", "c/d"]) == 2
    assert capsys.readouterr().err == "clip-phi: error: two models: a/b and --model c/d. Give one of them\n"
