"""The chat page as a Hugging Face Space: a folder that needs nothing but what its requirements.txt names."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

from ..environment import requirements

PACKAGES = ("clip_phi", "modeling_clip_phi")
ROOT = Path(__file__).resolve().parent.parent.parent
GRADIO = "6.31.0"  # where none is installed
APP = '''"""A page to talk to {model}."""

from clip_phi.serving.chat import launch
from clip_phi.serving.engine import Engine
from clip_phi.serving.parts import find_parts

launch(Engine({model!r}), find_parts("base.en", "", None, None), "0.0.0.0", 7860, None)
'''
README = """---
title: {title}
emoji: 🖼️
colorFrom: indigo
colorTo: gray
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: apache-2.0
short_description: Talk about pictures with a Clip-Phi model
{models}---

A page to talk about pictures with {model}, a small vision-language model that one person can train on one GPU. The page
is `app.py`; `clip_phi` and `modeling_clip_phi` are the project's own code. It runs on a CPU, and on a GPU if the Space
has one.
"""


def write_space(repo_id: str, model: str, folder: Path) -> Path:
    """Write app.py, requirements.txt, README.md and the project's code into a folder, which must not be there yet.

    repo_id: of the Space, user/name. model: an id on the Hub, or a merged checkpoint's folder, which is copied.
    Raises ValueError for a delta checkpoint in a folder: what completes it is not there where the Space runs."""
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"a Space is called user/name, not {repo_id!r}")
    if folder.exists():
        raise ValueError(f"{folder} is there already: remove it, or give another --output")
    local = Path(model).is_dir()
    if local and json.loads((Path(model) / "config.json").read_text(encoding="utf-8")).get("delta"):
        raise ValueError(
            f"{model} is completed from other folders: save it with merged=True, or give its id on the Hub"
        )
    folder.mkdir(parents=True)
    if local:
        shutil.copytree(model, folder / "model")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    name = "model" if local else model
    models = "" if local else f"models:\n- {model}\n"
    title = repo_id.split("/")[1]
    about = {"title": title, "model": title if local else model, "models": models, "gradio": _gradio_version()}
    (folder / "app.py").write_text(APP.format(model=name), encoding="utf-8")
    (folder / "README.md").write_text(README.format(**about), encoding="utf-8")
    (folder / "requirements.txt").write_text(
        "".join(f"{line}\n" for line in sorted(requirements().values())), encoding="utf-8"
    )
    return folder


def push_space(repo_id: str, folder: Path, private: bool) -> str:
    """Upload the folder. Returns the Space's address."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type="space", folder_path=folder)
    return str(url)


def _gradio_version() -> str:
    try:
        return version("gradio")
    except ModuleNotFoundError:
        return GRADIO
