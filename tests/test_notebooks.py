"""The notebooks of the course: stored with the outputs of their sources, without errors or traces of a machine."""

import ast
import configparser
import getpass
import itertools
import json
import re
import runpy
import shlex
import socket
import subprocess
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT

from clip_phi.cli import make_parser
from clip_phi.training.arguments import parse_arguments

SOURCES = sorted((ROOT / "notebooks").glob("[0-9]_*.py"))
BUILD = runpy.run_path(str(ROOT / "notebooks/build.py"))
# Folders of a machine, at the beginning of a path.
PATH = re.compile(r"(?<![\w.~/])/(?:home|root|tmp|Users|private|opt|mnt|var|usr|srv|proc|workspace)\b")
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def texts(notebook):
    """All text of the outputs, without images and sound."""
    found = []
    for output in outputs(notebook):
        parts = [output.get("text", "")]
        parts += [data for kind, data in output.get("data", {}).items() if not kind.startswith("image/")]
        found += [re.sub(r"base64,[\w+/=]+", "", "".join(part)) for part in parts if isinstance(part, str | list)]
    return "\n".join(found)


def check(path):
    """What must hold for a notebook that was executed."""
    notebook = read(path)
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    silent = ["".join(cell["source"]) for cell in code if not cell["outputs"]]
    assert not silent, f"cells without an output: {silent}"
    kinds = {output["output_type"] for output in outputs(notebook)}
    assert kinds <= {"stream", "display_data", "execute_result"}, kinds
    assert path.stat().st_size < 1e6
    printed = texts(notebook)
    traces = [line for line in printed.splitlines() if PATH.search(line) or socket.gethostname() in line]
    name = getpass.getuser()
    traces += [line for line in printed.splitlines() if re.search(rf"\b{re.escape(name)}@|/{re.escape(name)}/", line)]
    assert not traces, traces
    assert "Traceback" not in printed and "Warning" not in printed


def test_there_are_five_notebooks_and_each_has_a_source():
    assert [path.name[0] for path in SOURCES] == list("12345")
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == [path.stem for path in SOURCES]


@each_source
def test_the_stored_notebook_has_the_cells_of_its_source(source):
    cells = read(source.with_suffix(".ipynb"))["cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert found == BUILD["make_cells"](source), f"python notebooks/build.py {source.name[0]} makes it again"


@each_source
def test_stored_outputs_are_whole_small_and_of_no_machine(source):
    check(source.with_suffix(".ipynb"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"saved in {ROOT}/outputs/course\n", "saved in outputs/course\n"),
        (f"{sys.prefix}/lib/a.py: note\n", ".venv/lib/a.py: note\n"),
        ("10%|#\r50%|##\r100%|###\ndone\n", "100%|###\ndone\n"),
    ],
)
def test_folders_of_the_machine_are_left_out_of_outputs(text, shown):
    assert BUILD["portable"](text) == shown


def test_paths_of_a_machine_are_found():
    for text in ("in /home/me/a.py", "'/tmp/x'", "coco:/mnt/a"):
        assert PATH.search(text)
    assert not PATH.search("outputs/tmp/a.jpg, https://example.com/home/a and 1/home")


@each_source
def test_badge_and_first_cell_name_the_repository_of_setup_cfg(source):
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    url = settings["metadata"]["url"]
    title, first = (text for _, text in BUILD["make_cells"](source)[:2])
    owner_and_name = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", url)[1]
    page = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{source.stem}.ipynb"
    assert title.count(f"]({page})") == 1 and title.startswith(f"# {source.name[0]}. ")
    assert f"git clone --quiet --depth 1 {url} " in first and "google.colab" in first


def constants(tree):
    """All texts that a name of a notebook may have: REAL and its other value lead to different ones."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets, value = node.targets[0], node.value
            both = isinstance(targets, ast.Tuple) and isinstance(value, ast.Tuple)
            for target, each in zip(targets.elts, value.elts, strict=True) if both else [(targets, value)]:
                if isinstance(target, ast.Name) and isinstance(each, ast.Constant | ast.JoinedStr):
                    found.setdefault(target.id, []).append(each)
    return found


def versions(node, names):
    """Every text that an expression may be; what only a run can know is one word."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.FormattedValue):
        return versions(node.value, names)
    if isinstance(node, ast.Name) and node.id in names:
        return [text for value in names[node.id] for text in versions(value, names)]
    if isinstance(node, ast.JoinedStr):
        parts = [versions(part, names) for part in node.values]
        return ["".join(choice) for choice in itertools.product(*parts)]
    return ["5"]


def commands(source):
    """Every command that a notebook runs or would run with the other value of its switch."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names = constants(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "run"]
    return {text for call in calls for text in versions(call.args[0], names)}


@each_source
def test_commands_are_accepted_by_the_real_parsers(source, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(source)
    text = source.read_text(encoding="utf-8")
    assert ("run(" in text) == bool(found) and text.count("accelerate launch") <= len(found)
    for command in found:
        program, *words = shlex.split(command)
        if program == "accelerate":
            assert words[0] == "launch"
            launch = launch_command_parser().parse_args(words[1:])
            assert (ROOT / launch.config_file).is_file()
            assert launch.training_script == "train_accelerate.py"
            parse_arguments(launch.training_script_args)
        elif program == "python":
            assert (ROOT / words[0]).is_file()
        else:
            assert program == "clip-phi", command
            make_parser().parse_args(words)


@pytest.mark.notebooks
def test_all_notebooks_run_from_their_sources(tmp_path):
    command = [sys.executable, "notebooks/build.py", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    for source in SOURCES:
        check(tmp_path / f"{source.stem}.ipynb")
