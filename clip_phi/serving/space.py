"""The chat page as a Hugging Face Space: a folder with the page, its requirements and the project's code."""

import json
import shutil
from pathlib import Path

from ..environment import installed_version, requirements
from ..templates import render

ROOT = Path(__file__).resolve().parent.parent.parent
GRADIO = "6.31.0"  # version where gradio is not installed


def write_space(repo_id: str, model: str, folder: Path) -> Path:
    """Write app.py, requirements.txt, README.md and the project's code into a new folder.

    model: a Hub id, or the folder of a merged model, which is copied.
    Raises ValueError for the folder of a delta model: a Space cannot load its backbones from local folders."""
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"a Space id is user/name, not {repo_id!r}")
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it, or choose another --output_dir")
    local = Path(model).is_dir()
    if local and json.loads((Path(model) / "config.json").read_text(encoding="utf-8")).get("delta"):
        raise ValueError(f"{model} is a delta of other models: save it with merged=True, or use its Hub id")
    folder.mkdir(parents=True)
    if local:
        shutil.copytree(model, folder / "model")
    for package in ("clip_phi", "modeling_clip_phi"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    gradio = installed_version("gradio") or GRADIO
    about = {"title": repo_id.split("/")[1], "hub_id": None if local else model, "gradio": gradio}
    app = render("space.txt", model=repr("model" if local else model))
    (folder / "app.py").write_text("".join(app), encoding="utf-8")
    (folder / "README.md").write_text("".join(render("space.md", **about)), encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(sorted(requirements().values())) + "\n", encoding="utf-8")
    return folder


def push_space(repo_id: str, folder: Path, private: bool) -> str:
    """Upload the folder. Returns the Space's URL."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type="space", folder_path=folder)
    return str(url)
