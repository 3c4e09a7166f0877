"""Pages and the model card as templates: escaped, with one style, and shipped in a wheel and in a Space."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from clip_phi.serving.space import write_space
from clip_phi.templates import render

ROOT = Path(__file__).parent.parent
TEMPLATES = {path.name for path in (ROOT / "clip_phi/templates").iterdir() if path.suffix in (".css", ".html", ".md")}


def test_html_is_escaped_and_values_must_be_given():
    values = {"title": "<b>", "rows": [("a", "<i>")], "samples": [], "line": str, "zip": zip}
    text = "".join(render("inspection.html", **values))
    assert "<h1>&lt;b&gt;</h1>" in text and "<td>&lt;i&gt;</td>" in text
    with pytest.raises(Exception, match="'line' is undefined"):
        "".join(render("inspection.html", **{name: value for name, value in values.items() if name != "line"}))


def test_samples_are_read_while_the_page_is_written():
    """A page of thousands of images is never whole in memory."""

    class Shown:
        title = counts = image_line = "x"
        image = Image.new("RGB", (2, 2))
        origins, conversations = (), ()

    read = []
    samples = (read.append(number) or Shown() for number in range(9))
    pieces = render("inspection.html", title="", rows=[], samples=samples, line=str, zip=zip)
    while not read:
        next(pieces)
    assert len(read) == 1
    assert "".join(pieces).count("<section>") == 8


def test_one_template_has_the_style_of_all_pages():
    texts = {name: (ROOT / "clip_phi/templates" / name).read_text() for name in TEMPLATES}
    assert [name for name, text in texts.items() if "<style>" in text] == ["page.html"]
    product = [path.read_text() for path in (ROOT / "clip_phi").rglob("*.py")]
    assert not any(re.search("<style>|<html", text) for text in product)


def test_a_wheel_and_a_space_contain_the_templates(tmp_path):
    source = tmp_path / "source"
    for name in ("clip_phi", "modeling_clip_phi"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run([str(word) for word in command], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    page = {f"web/{path.name}" for path in (ROOT / "clip_phi/templates/web").iterdir()}
    assert held >= {f"clip_phi/templates/{name}" for name in TEMPLATES | page} and len(TEMPLATES) >= 3 <= len(page)
    space = write_space("alice/space", "alice/model", tmp_path / "space")
    assert {path.name for path in (space / "clip_phi/templates").iterdir()} >= TEMPLATES
