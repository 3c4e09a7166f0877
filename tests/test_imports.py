"""The import walls: which part of the project may know which other."""

import subprocess
import sys

from helpers import ROOT
from house import imported_modules

from clip_phi.cli import make_parser

# Each part of clip_phi and what it may import from clip_phi: a part knows only those below it.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "environment": set(),
    "templates": set(),
    "data": set(),
    "batching": {"data"},
    "speech": {"data"},
    "export": {"hub", "templates"},
    "hub": {"data", "environment", "templates"},
    "evaluation": {"batching", "data", "environment", "hub", "templates"},
    "training": {"batching", "data", "environment", "evaluation", "hub"},
    "serving": {"batching", "data", "environment", "evaluation", "hub", "speech", "templates"},
}
ALLOWED["tools"] = set(ALLOWED)
ALLOWED["commands"] = set(ALLOWED)
ALLOWED["cli"] = {"commands"}
SHIPPED = {
    "configuration_clip_phi": set(),
    "processing_clip_phi": {"configuration_clip_phi", "backbones"},
    "backbones": {"configuration_clip_phi"},
    "modeling_clip_phi": {"configuration_clip_phi", "backbones"},
}


def test_parts_of_clip_phi_import_one_way():
    files = sorted((ROOT / "clip_phi").rglob("*.py"))
    assert len(files) > 10
    for path in files:
        part = path.relative_to(ROOT / "clip_phi").with_suffix("").parts[0]
        for module in imported_modules(path):
            names = module.split(".")
            assert names[0] not in ("tests", "examples", "benchmarks", "train_accelerate"), f"{path} imports {module}"
            if names[0] == "clip_phi" and len(names) > 1 and names[1] != part:
                assert names[1] in ALLOWED[part], f"{path} imports {module}"


def test_shipped_files_import_only_each_other_and_by_relative_names():
    for path in sorted((ROOT / "modeling_clip_phi").glob("[a-z]*.py")):
        allowed = SHIPPED[path.stem]
        for module in imported_modules(path):
            top, *rest = module.split(".")
            assert top != "clip_phi", f"{path} imports {module}"
            if top == "modeling_clip_phi":
                assert rest and rest[0] in allowed, f"{path} imports {module}"
        assert "import modeling_clip_phi" not in path.read_text(encoding="utf-8")


def command_names() -> list[str]:
    parser = make_parser()
    return list(next(action.choices for action in parser._actions if action.dest == "command"))


def test_help_imports_no_torch():
    for command in (
        "import runpy; sys.argv = ['train_accelerate.py', '--stage', '2', '--help']; "
        "runpy.run_path('train_accelerate.py', run_name='__main__')",
        "from clip_phi.cli import main; main(['--help'])",
        *(f"from clip_phi.cli import main; main(['{name}', '--help'])" for name in command_names()),
    ):
        script = f"import sys\ntry:\n    exec({command!r})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
