"""The size and the shape of the code stay within bounds, and the tests keep to their own rules."""

import ast
import json
import re
import subprocess
import sys

import house
import pytest
from helpers import ROOT

BOUNDS = {
    "product_lines": 16_298,
    "modeling_lines": 450,
    "remote_code_lines": 900,
    "longest_function_in_loop": 80,
    "readme_lines": 200,
    "long_lines": 0,
    "import_circles": 0,
}
TEST_FILES = sorted((ROOT / "tests").glob("test_*.py"))


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    path = tmp_path_factory.mktemp("house") / "out.json"
    command = [sys.executable, str(ROOT / "tests/house.py"), "--json", str(path)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(found)
    return found


@pytest.mark.parametrize("name", BOUNDS)
def test_the_code_stays_within_its_bounds(name, figures):
    assert figures[name] <= BOUNDS[name], figures["circles"] if name == "import_circles" else ""


def test_the_figures_are_those_of_a_plain_count(figures):
    files = [*(ROOT / "clip_phi").rglob("*.py"), *(ROOT / "modeling_clip_phi").rglob("*.py")]
    files.append(ROOT / "train_accelerate.py")
    assert figures["product_lines"] == sum(path.read_bytes().count(b"\n") for path in files)
    assert figures["readme_lines"] == (ROOT / "README.md").read_bytes().count(b"\n")
    assert len(figures["modules"]) == len(files) and "clip_phi.data" in figures["modules"]


@pytest.mark.parametrize(
    ("graph", "circles"),
    [
        ({"a": {"b"}, "b": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [["a", "b", "c"]]),
        ({"a": {"b"}, "b": {"a"}, "c": {"d", "a"}, "d": {"c"}}, [["a", "b"], ["c", "d"]]),
    ],
)
def test_circles_are_found(graph, circles):
    assert house.find_circles(graph) == circles


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_a_test_file_imports_from_no_other_test_file(path):
    """Not in the text of scripts either, which tests run in processes of their own."""
    modules = {other.stem for other in TEST_FILES}
    texts = [path.read_text(encoding="utf-8")]
    nodes = list(ast.walk(ast.parse(texts[0])))
    texts += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for text in texts:
        for line in text.splitlines():
            words = line.split()
            assert not (len(words) > 1 and words[0] in ("from", "import") and words[1] in modules), line


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_no_assertion_passes_because_a_file_is_absent(path):
    """`assert a or not path.exists()` holds where nothing was written."""
    asks = {"exists", "is_dir", "is_file"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assert):
            for choice in (each for each in ast.walk(node.test) if isinstance(each, ast.BoolOp | ast.IfExp)):
                if isinstance(choice, ast.IfExp) or isinstance(choice.op, ast.Or):
                    names = {each.attr for each in ast.walk(choice) if isinstance(each, ast.Attribute)}
                    assert not names & asks, f"line {node.lineno}: {ast.unparse(node)}"


def test_every_benchmark_is_run_by_a_test():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    names = ("benchmarks", "first_step", "full_size", "plan", "peers", "speech_real")
    tests = [ROOT / "tests" / f"test_{name}.py" for name in names]
    run_by_tests = "".join(path.read_text() for path in tests)
    assert [name for name in sorted(scripts) if not re.search(rf"\b{name}\b", run_by_tests)] == []


def test_every_target_of_tests_is_run_before_a_change_lands():
    """All but those that need gigabytes or a network, whose packages change from day to day, or that take long and
    whose code seldom changes: the metrics beside Java's, real speech, and transformers.js."""
    targets = set(re.findall(r"^(test[a-z-]*|notebooks):", (ROOT / "Makefile").read_text(), re.M))
    run_by_ci = set(re.findall(r"^make (\S+)", (ROOT / ".ci/run").read_text(), re.M))
    left_out = {
        "test-full-size",
        "test-main",
        "test-newest",
        "test-oracle",
        "test-speech",
        "test-trl",
        "test-two-images",
    }
    left_out |= {"test-vllm", "test-web"}
    assert targets - run_by_ci == left_out
    markers = set(re.findall(r"pytest -m (\w+)", (ROOT / "Makefile").read_text()))
    assert markers == set(re.findall(r"not (\w+)", (ROOT / "setup.cfg").read_text()))


def called(node: ast.AST) -> str:
    """The name of the function that is called, or an empty text."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


@pytest.mark.parametrize("path", [*TEST_FILES, ROOT / "tests/helpers.py"], ids=lambda path: path.stem)
def test_every_return_code_is_checked(path):
    """Where a process ends, the function that started it looks at its return code."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            nodes = list(ast.walk(function))
            starts = [node for node in nodes if called(node) in ("subprocess.run", "run_forked")]
            if any(not any(each.arg == "check" for each in node.keywords) for node in starts):
                looks = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
                assert "returncode" in looks, f"line {function.lineno}: {function.name}"
