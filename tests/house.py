"""Measure the code: its size, its longest function, its longest lines, and circles among its imports.

    python tests/house.py --json OUT.json

tests/test_house.py holds the bounds. The figures:
    product_lines: lines of Python in modeling_clip_phi, clip_phi and train_accelerate.py.
    modeling_lines: lines of modeling_clip_phi/modeling_clip_phi.py.
    remote_code_lines: lines of modeling_clip_phi/*.py, the code that the Hub serves.
    longest_function_in_loop: lines of the longest function of train_accelerate.py.
    readme_lines: lines of README.md.
    long_lines: lines of Python, of the product and around it, that are longer than 120 characters.
    import_circles: groups of parts of clip_phi that import each other; a part is a folder, or a file beside them.
    circles: the parts of each such group.
    modules: dotted names of all modules of the product.
"""

import argparse
import ast
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINE_LENGTH = 120


def product_files() -> list[Path]:
    folders = [path for name in ("modeling_clip_phi", "clip_phi") for path in (ROOT / name).rglob("*.py")]
    return sorted([*folders, ROOT / "train_accelerate.py"])


def count_lines(*paths: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of all that a file of this project imports, inside functions too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            found.add(module)
            if module == "clip_phi":  # `from clip_phi import data` imports a part
                found |= {f"clip_phi.{alias.name}" for alias in node.names}
    return found


def imports_between_parts() -> dict[str, set[str]]:
    """The other parts of clip_phi that each part imports."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "clip_phi").rglob("*.py"):
        part = path.relative_to(ROOT / "clip_phi").with_suffix("").parts[0]
        names = [module.split(".") for module in imported_modules(path)]
        others = {name[1] for name in names if name[0] == "clip_phi" and len(name) > 1}
        found[part] = found.get(part, set()) | others - {part}
    return {part: others & found.keys() for part, others in found.items()}


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of at least two nodes that reach each other."""

    def reach(start: str) -> set[str]:
        reached, pending = set(), [start]
        while pending:
            for other in graph[pending.pop()] - reached:
                reached.add(other)
                pending.append(other)
        return reached

    reached = {node: reach(node) for node in graph}
    groups = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return sorted(sorted(group) for group in groups if group)


def longest_function(path: Path) -> int:
    """Lines of the longest function or method, its decorators included."""
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return max(
        node.end_lineno - min([node.lineno, *(each.lineno for each in node.decorator_list)]) + 1 for node in functions
    )


def measure() -> dict:
    remote_code = sorted((ROOT / "modeling_clip_phi").glob("*.py"))
    around = [path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    lines = [line for path in product_files() + around for line in path.read_text(encoding="utf-8").splitlines()]
    circles = find_circles(imports_between_parts())
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in product_files()]
    return {
        "product_lines": count_lines(*product_files()),
        "modeling_lines": count_lines(ROOT / "modeling_clip_phi/modeling_clip_phi.py"),
        "remote_code_lines": count_lines(*remote_code),
        "longest_function_in_loop": longest_function(ROOT / "train_accelerate.py"),
        "readme_lines": count_lines(ROOT / "README.md"),
        "long_lines": sum(len(line) > LINE_LENGTH for line in lines),
        "import_circles": len(circles),
        "circles": circles,
        "modules": [name.removesuffix(".__init__") for name in names],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the code of this project.")
    parser.add_argument("--json", metavar="FILE", help="file to write the figures to, as json")
    arguments = parser.parse_args()
    figures = measure()
    for name, value in figures.items():
        print(f"{name}: {value if isinstance(value, int) else ', '.join(map(str, value)) or 'none'}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
