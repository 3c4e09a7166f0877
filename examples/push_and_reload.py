"""Push a model in both forms, load each in a clean process, and compare the logits.

    python examples/push_and_reload.py

The script starts a hub on this machine (tests/hub_server.py) and uses it over HTTP with an empty cache, so it needs
no account and no network. It uploads the demo's two small backbones first, so that the delta can name them.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKBONES = ROOT / "examples" / "demo_backbones"

# Runs where nothing of this project can be imported: the repository alone must be enough.
CLEAN_PROCESS = """
import sys
import torch
from transformers import AutoModelForImageTextToText

repo_id, revision, inputs, logits = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(repo_id, revision=revision, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(**torch.load(inputs)).logits, logits)
assert "modeling_clip_phi" not in sys.modules, "the installed package was used"
"""


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server import HubServer  # type: ignore[import-not-found]

    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        # huggingface_hub reads these when it is imported, below
        os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN="hf_alice", HF_HOME=f"{folder}/cache", HF_HUB_OFFLINE="0")
        os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1")
        push_and_reload(Path(folder))


def push_and_reload(folder: Path) -> None:
    import torch
    from huggingface_hub import HfApi

    from clip_phi.data.synthetic import write_dataset
    from clip_phi.hub.push import push
    from modeling_clip_phi import ClipPhiForCausalLM, ClipPhiProcessor

    api = HfApi()
    for part in ("vision", "text"):
        api.create_repo(f"alice/demo-{part}")
        api.upload_folder(repo_id=f"alice/demo-{part}", folder_path=BACKBONES / part)
    names = ("alice/demo-vision", "alice/demo-text")
    processor = ClipPhiProcessor.from_backbones(*names)
    model = ClipPhiForCausalLM.from_backbones(*names, image_token_id=processor.image_token_id)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")

    from clip_phi.batching.images import load_image

    write_dataset(folder / "data", num_train=1, num_val=1)
    image = load_image(next((folder / "data/val2017").iterdir()))
    inputs = processor(images=[image], text=["<image>Instruct: Describe the image.\nOutput:"], return_tensors="pt")
    torch.save(dict(inputs), folder / "inputs.pt")
    with torch.no_grad():
        expected = model(**inputs).logits

    for form in ("delta", "merged"):
        pushed = push(folder / "model", f"alice/{form}", merged=form == "merged")
        size = sum(sibling.size or 0 for sibling in api.model_info(pushed.repo_id, files_metadata=True).siblings or [])
        arguments = [pushed.repo_id, pushed.revision, folder / "inputs.pt", folder / f"{form}.pt"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["HF_HOME"] = str(folder / f"cache-of-{form}")
        command = [sys.executable, "-c", CLEAN_PROCESS, *map(str, arguments)]
        if subprocess.run(command, cwd=folder, env=environment).returncode != 0:
            sys.exit(f"the {form} model does not load in a clean process; see its message above")
        difference = (torch.load(folder / f"{form}.pt") - expected).abs().max().item()
        print(f"{form}: {size / 1e6:.2f} MB on the hub, largest logit difference {difference:g}")
        if difference != 0:
            sys.exit("the loaded model differs from the pushed one")


if __name__ == "__main__":
    main()
