"""Helpers that the notebooks share: what this machine has, running a command, and showing images."""

import io
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

MODEL = "outputs/demo/model"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when transformers is imported
warnings.filterwarnings("ignore", message="IProgress not found")


def describe_machine() -> None:
    """Print where the notebook runs, and the GPU if there is one."""
    where = "Colab" if "google.colab" in sys.modules else "this machine"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU; the demo needs none"
    print(f"Running on {where}: Python {sys.version.split()[0]}, torch {torch.__version__}, {gpu}.")


def demo_model() -> str:
    """The folder of the demo's model. Where it is not there yet, the demo is run first, which takes minutes."""
    if not Path(MODEL, "config.json").is_file():
        print("The demo's model is not here yet. Training it takes two to ten minutes.")
        run("python examples/demo.py")
    print(f"The demo's model is in {MODEL}.")
    return MODEL


def local_hub(folder: str) -> None:
    """Start a hub on this machine, and make it the one that this notebook and its commands use.

    It is in memory, and gone with the notebook. Call it before huggingface_hub or transformers is imported.
    folder: for the cache of what is downloaded from it."""
    sys.path.append("tests")
    from hub_server import HubServer

    hub = HubServer().__enter__()
    os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN="hf_alice", HF_HOME=os.path.abspath(folder))
    os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="0")
    print("A hub on this machine is used; you are logged in there as alice.")


def run(command: str, stop_at: str | None = None) -> None:
    """Run a command and print its output as it appears.

    stop_at: the command gets SIGTERM at the first line that begins so, as on a machine that is taken away.
    Raises RuntimeError if the command fails and was not stopped."""
    print(f"$ {command}", flush=True)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": programs, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "30"}
    process = subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    stopped = False
    for line in io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline=""):  # "\r" stays
        print(line, end="", flush=True)
        if stop_at is not None and line.startswith(stop_at) and not stopped:
            process.terminate()
            stopped = True
    if process.wait() != 0 and not stopped:
        raise RuntimeError(f"this command failed with status {process.returncode}: see its last lines above")


def show(
    images: Sequence[Image.Image | str | Path], titles: Sequence[str] = (), columns: int = 4, width: float = 3
) -> None:
    """Show images in rows, with a title above each. width: of an image, in inches."""
    import matplotlib.pyplot as plt

    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, (width + 0.2) * rows), squeeze=False)
    for place in axes.flat:
        place.axis("off")
    for place, image, title in zip(axes.flat, images, [*titles, *[""] * len(images)], strict=False):
        place.imshow(image if isinstance(image, Image.Image) else Image.open(image))
        place.set_title(title, fontsize=9, wrap=True)
    figure.tight_layout()
    plt.show()
