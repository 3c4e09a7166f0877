"""README, docs and CONTRIBUTING: their commands and Python blocks run, and what they name exists.

The commands run in a copy of the repository, on fewer scenes and for a few steps, so that this takes a minute.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fork_server import free_port, run_forked
from huggingface_hub import ModelCard
from PIL import Image
from scene_scores import question_kind

from clip_phi.cli import make_parser
from clip_phi.hub.card import Run, card_images, make_card
from clip_phi.training.arguments import Stage1Arguments, Stage2Arguments

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]
TINY = "--hidden 64 --layers 1 --images 2 --repeats 1 --log-mean 3"
SMALL = "--num_train 24 --num_val 8 --max_steps 2"
RECIPE = "--data {kind}:outputs/demo/data/{train},images=outputs/demo/data/train2017 "
RECIPE += "--eval_data {kind}:outputs/demo/data/{val},images=outputs/demo/data/val2017 --max_steps 1 "
RECIPE += "--dataloader_num_workers 0 --max_new_tokens 4"
STAGE1 = RECIPE.format(
    kind="coco", train="annotations/captions_train2017.json", val="annotations/captions_val2017.json"
)
STAGE1 += " --vision_backbone examples/demo_backbones/vision --text_backbone examples/demo_backbones/text"
FORKED = {".venv/bin/clip-phi": "clip_phi.cli", "accelerate": "accelerate.commands.accelerate_cli"}
STAGE2 = RECIPE.format(kind="llava", train="llava_instruct_train.json", val="llava_instruct_val.json")


def blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)


def commands(name):
    lines = "".join(blocks(name, "bash")).splitlines()
    return [line.split(" # ")[0].strip() for line in lines if line.strip()]


POLL = """
import os, sys, time, urllib.request
for _ in range(2000):
    try:
        print(urllib.request.urlopen("http://127.0.0.1:PORT/health").read())
        break
    except OSError:
        os.kill(int(sys.argv[1]), 0)  # raises if the server has ended
        time.sleep(0.3)
else:
    raise SystemExit("the server does not answer")
"""


def shrink(command):
    """The same command on little work: fewer steps, the CPU, the demo's data in place of COCO and LLaVA-Instruct."""
    command = command.replace("000000004012.jpg", "000000000025.jpg").replace("000000004002.jpg", "000000000026.jpg")
    if command.startswith(".venv/bin/clip-phi serve"):  # until it answers
        port = free_port()
        poll = shlex.quote(POLL.replace("PORT", port))
        return f"{command} --port {port} & python -c {poll} $!; status=$?; kill %1; wait; exit $status"
    if command.startswith(".venv/bin/clip-phi download"):
        return f"{command} --help"
    if command.startswith("accelerate launch"):
        command = command.replace("accelerate_config.yaml", "examples/configs/cpu.yaml")
        return f"{command} {STAGE1 if '--stage 1' in command else STAGE2}"
    make = f"make -o .venv/installed {command.removeprefix('make')}"
    return {"make demo": f"{make} ARGS='{SMALL}'", "make bench": f"{make} ARGS='{TINY}'"}.get(command, command)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what git tracks or would track, with the running environment as its .venv."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else []
    assert names, "the tests run in a git checkout"
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(command, clone):
    path = f"{clone / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(clone), "MAKEFLAGS": ""}
    program, *words = shlex.split(command)
    if program in FORKED and "&" not in words:
        done = run_forked(FORKED[program], words, clone, environment)
    else:
        done = subprocess.run(["bash", "-c", command], cwd=clone, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(clone):
    return run(shrink("make demo"), clone)


def test_demo_writes_its_files(demo, clone):
    output = clone / "outputs/demo"
    result = json.loads((output / "result.json").read_text())
    promised = {"caption_f1_stage1", "caption_f1", "caption_f1_blind", "caption_f1_shuffled", "answer_accuracy"}
    promised |= {"answer_accuracy_blind", "answer_accuracy_shuffled", "answer_accuracy_question_only"}
    promised |= {"train_seconds_stage1", "train_seconds_stage2", "total_seconds", "cpu_seconds"}
    assert (
        set(result) == promised | {"second_turn_accuracy", "accuracy_by_kind", "scenes", "questions"}
        and result["scenes"] == 8
    )
    assert all(0 <= result[name] <= 1 for name in promised if name.startswith(("caption", "answer")))
    samples = [json.loads(line) for line in (output / "model/evaluation/vqa.samples.jsonl").read_text().splitlines()]
    kinds = [question_kind(sample["question"]) for sample in samples]
    assert result["questions"] == len(kinds) and set(result["accuracy_by_kind"]) == set(kinds)
    mean = sum(result["accuracy_by_kind"][kind] for kind in kinds) / len(kinds)
    assert mean == pytest.approx(result["answer_accuracy"], abs=1e-3)
    assert (output / "sheet.png").read_bytes()[:4] == (output / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert {"config.json", "model.safetensors", "modeling_clip_phi.py"} <= {
        path.name for path in (output / "model").iterdir()
    }
    assert f"{result['caption_f1']:.2f}" in demo and "the same answer" in demo
    scenes, _, table = demo.partition("3 scenes that")[2].partition("captions after stage 1")
    assert table and [scenes.count(f"   {label}:") for label in ("caption", "question", "answer")] == [3, 3, 3]
    assert scenes.count("#") > 20, "the scenes are drawn as text"
    for task in ("captions", "vqa"):
        page = (output / f"model/evaluation/{task}.html").read_text()
        assert "shuffled images" in page and "<img src=" in page


def test_a_scene_is_printed_as_text_and_in_colors(tmp_path):
    text_picture = runpy.run_path(str(ROOT / "examples/demo.py"))["text_picture"]
    image = Image.new("RGB", (64, 64), (230, 230, 230))
    image.paste((200, 30, 40), (0, 0, 32, 16))  # the upper quarter of the left half
    image.save(tmp_path / "scene.png")
    assert text_picture(tmp_path / "scene.png", colored=False)[2:] == ["." * 16] * 6
    assert text_picture(tmp_path / "scene.png", colored=False)[0] == "#" * 8 + "." * 8
    lines = text_picture(tmp_path / "scene.png", colored=True)
    assert len(lines) == 8 and all(line.count("\u2580") == 16 and line.endswith("\033[0m") for line in lines)
    assert "38;2;200;30;40" in lines[0] and "38;2;200;30;40" not in lines[-1]


def test_card_of_the_demos_model_has_its_evaluation(demo, clone):
    run_of_demo = Run.read(clone / "outputs/demo/model")
    card = make_card(run_of_demo, "me/demo", "weights-1", True, card_images(run_of_demo), {})
    evaluated = {
        path.stem: json.loads(path.read_text()) for path in (clone / "outputs/demo/model/evaluation").glob("*.json")
    }
    assert {"captions", "vqa"} <= evaluated.keys()
    results = ModelCard(card).data.eval_results
    for task, metric in (("captions", "CIDEr-D"), ("vqa", "vqa_accuracy")):
        values = [each.metric_value for each in results if each.dataset_type == task]
        kinds = ("score", "blind", "shuffled")
        assert values == pytest.approx([evaluated[task]["metrics"][metric][kind] for kind in kinds], abs=1e-6)
    assert str(clone) not in card


README_COMMANDS = [
    command for command in commands("README.md") if command not in ("make demo", "source .venv/bin/activate")
]
# Commands of the docs that begin with .venv/bin need only what the demo writes; the others need extras or a network.
DOCS_COMMANDS = [
    command
    for page in PAGES
    for command in commands(page)
    if command.startswith(".venv/bin/clip-phi") and command not in README_COMMANDS
]


@pytest.mark.parametrize("command", dict.fromkeys(README_COMMANDS + DOCS_COMMANDS))
def test_command_of_readme_and_docs_runs(command, demo, clone):
    assert command.split()[0] in ("accelerate", ".venv/bin/clip-phi"), "shrink() must make this command small"
    assert run(shrink(command), clone).strip()


@pytest.mark.parametrize("page", ["README.md", "docs/model.md", "docs/explain.md"])
def test_python_of_readme_and_docs_runs(page, demo, clone):
    assert blocks(page, "python")
    for code in blocks(page, "python"):
        (clone / "block.py").write_text(shrink(code))
        done = run_forked(clone / "block.py", [], clone, dict(os.environ))
        assert done.returncode == 0, done.stdout + done.stderr


def test_readme_begins_with_an_image_and_the_demo():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert lines[2].startswith("![") and "make demo" in lines[:20]
    assert (ROOT / "docs/demo.png").stat().st_size < 100_000


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), f"{page} links {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, f"{page} links {target}"
    for path in re.findall(r"\b((?:clip_phi|modeling_clip_phi|tests|examples|benchmarks)/[\w/]*\w\.(?:py|yaml))", text):
        assert (ROOT / path).is_file(), f"{page} names {path}"
    for name in re.findall(r"\b(clip_phi(?:\.\w+)+)(?!\.?\w*\()", text):
        parts = name.split(".")
        module = importlib.import_module(".".join(part for part in parts if part.islower() or part == parts[0]))
        assert all(part.islower() or hasattr(module, part) for part in parts), f"{page} names {name}"


def test_functions_named_in_the_architecture_exist():
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("clip_phi", "modeling_clip_phi")
        for path in (ROOT / folder).rglob("*.py")
    )
    code += (ROOT / "train_accelerate.py").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)\(\)`", (ROOT / "docs/architecture.md").read_text(encoding="utf-8")))
    assert named and not [name for name in named if f"def {name}(" not in code]


OTHER_PROGRAMS = {"--config_file", "--model_args", "--tasks", "--no-deps", "--model-impl", "--trust-remote-code"}
OTHER_PROGRAMS |= {"--chat-template-content-format", "--limit-mm-per-prompt"}  # of vLLM
OTHER_PROGRAMS |= {"--data-parallel-size", "--tensor-parallel-size"}
OTHER_PROGRAMS |= {"--prefix", "--ignore-scripts", "--directory"}  # of npm and Python's http.server


def known_options():
    """The options of training, of clip-phi and its commands, and of the scripts."""
    found = {f"--{name}" for stage in (Stage1Arguments, Stage2Arguments) for name in stage.__dataclass_fields__}
    found |= {"--help", "--config", "--stage"} | OTHER_PROGRAMS
    parsers = [make_parser()]
    while parsers:
        for action in parsers.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    for folder in ("benchmarks", "examples", "tests"):
        for path in (ROOT / folder).glob("*.py"):
            found |= set(re.findall(r"add(?:_?option|_argument)\(\s*\"(--[\w-]+)", path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_options_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", text, re.S))
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known_options()
    assert not unknown, f"{page} names {sorted(unknown)}"


def test_contributing_names_the_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {command.split()[1] for command in commands("CONTRIBUTING.md")}
    assert named == targets - {"clean", "format", "demo"}


@pytest.mark.benchmarks
def test_make_bench_prints_its_figures(clone):
    assert "flops_ratio_true_size" in run(shrink("make bench"), clone)


def test_help_named_in_readme_shows_the_options(clone):
    assert "--learning_rate" in run("python train_accelerate.py --stage 1 --help", clone)


@pytest.mark.parametrize("path", sorted((ROOT / "examples/recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_accepted(path, clone, demo):
    script = "from clip_phi.training.arguments import parse_arguments; import sys; "
    script += "parse_arguments(['--config', sys.argv[1]]).check()"
    run(f"python -c {shlex.quote(script)} examples/recipes/{path.name}", clone)


def test_updates_of_the_pretraining_are_near_orthogonal():
    orthogonalize = runpy.run_path(str(ROOT / "examples/pretrain_demo_backbones.py"))["orthogonalize"]
    for shape in ((3, 32, 32), (2, 64, 16), (1, 16, 64)):
        found = orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        values = torch.linalg.svdvals(found)
        assert found.shape == shape and values.min() > 0.1 and values.max() < 1.3


def test_backbones_can_be_pretrained_again(clone, tmp_path):
    run(f"python examples/pretrain_demo_backbones.py --output {tmp_path} --tower_steps 2 --decoder_steps 2", clone)
    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    made = (str(tmp_path / "vision"), str(tmp_path / "text"))
    shipped = (str(ROOT / "examples/demo_backbones/vision"), str(ROOT / "examples/demo_backbones/text"))
    assert (
        ClipPhiProcessor.from_backbones(*made).num_image_tokens
        == ClipPhiProcessor.from_backbones(*shipped).num_image_tokens
    )
    new, old = ClipPhiForCausalLM.from_backbones(*made), ClipPhiForCausalLM.from_backbones(*shipped)
    assert {name: value.shape for name, value in new.state_dict().items()} == {
        name: value.shape for name, value in old.state_dict().items()
    }
    size = sum(path.stat().st_size for path in (ROOT / "examples/demo_backbones").rglob("*") if path.is_file())
    assert size < 12e6


@pytest.mark.demo
def test_demo_reaches_its_bounds_on_unseen_scenes():
    """The whole demo: make test-demo runs it first, as a newcomer does."""
    result = json.loads((ROOT / "outputs/demo/result.json").read_text())
    print(json.dumps(result, indent=2))
    assert result["caption_f1_stage1"] >= 0.85
    assert result["caption_f1"] >= 0.95
    assert result["caption_f1_blind"] <= 0.10
    assert result["caption_f1_shuffled"] <= result["caption_f1_blind"] + 0.05
    assert result["answer_accuracy"] >= 0.95
    assert set(result["accuracy_by_kind"]) == {"color", "shape", "presence", "count", "left_right", "above_below"}
    assert min(result["accuracy_by_kind"].values()) >= 0.90
    assert result["second_turn_accuracy"] >= result["answer_accuracy"] - 0.02
    assert result["answer_accuracy_question_only"] <= 0.55
    assert result["answer_accuracy_blind"] <= 0.40
    assert result["answer_accuracy_shuffled"] <= result["answer_accuracy_blind"] + 0.05
    assert result["cpu_seconds"] < 450, "the demo takes minutes, also where other programs slow it down"
    for task, least in (("captions", 1.0), ("vqa", 0.5)):
        evaluated = json.loads((ROOT / f"outputs/demo/model/evaluation/{task}.json").read_text())
        assert evaluated["margin_ci95"][0] > least
    check_table_of_readme(result)


def check_table_of_readme(result):
    """README's figures are the demo's, up to what another processor's rounding changes in training."""
    text = (ROOT / "README.md").read_text()
    for label, key in (
        ("captions after stage 1, object-and-color F1", "caption_f1_stage1"),
        ("captions after stage 2, object-and-color F1", "caption_f1"),
        ("answers after stage 2, accuracy", "answer_accuracy"),
        ("answers to a second question, accuracy", "second_turn_accuracy"),
    ):
        cells = re.search(rf"^\| {label} \|(.*)\|$", text, re.MULTILINE).group(1).split("|")
        for cell, end in zip(cells, ("", "_blind", "_shuffled"), strict=True):
            assert bool(cell.strip()) == (key + end in result), label
            assert not cell.strip() or abs(float(cell) - result[key + end]) <= 0.02, (label, end)
    assert f"{result['scenes']:,} unseen scenes, {result['questions']:,} questions" in text
    (guess,) = re.findall(r"the most frequent answer to each question is right for (0\.\d+)", text)
    assert abs(float(guess) - result["answer_accuracy_question_only"]) <= 0.01
