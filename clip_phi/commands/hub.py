"""clip-phi push, export and import-projector: give a trained model to others, and take one in."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .common import add_command, add_json, add_model, choose_model


def add_to(commands: Any) -> None:
    push = add_command(commands, "push", run_push, "upload of a trained model to the Hub, with its model card")
    add_model(push, argument=True)
    add = push.add_argument
    add("repo_id", metavar="USER/NAME", help="repository on the Hub, created if it does not exist")
    add("--merged", action="store_true", help="the whole model, LoRA folded in, instead of the trained weights alone")
    add("--private", action="store_true", help="private repository, if it is created")
    add("--revision", metavar="BRANCH", help="branch to push to, created if needed (default: main)")
    add("--tag", help="tag of the pushed commit (default: made from the weights' hash)")
    add("--create_pr", action="store_true", help="a pull request instead of a commit")
    add("--message", help="commit message")
    add("--no_images", action="store_true", help="a card without sample images")

    export = add_command(commands, "export", run_export, "a trained model's files for llama.cpp, vLLM, Llava or ONNX")
    add_model(export, argument=True)
    export.add_argument("folder", metavar="DIR", help="folder to write")
    help = "gguf: text model and mmproj for llama.cpp; llava: stock LlavaForConditionalGeneration; onnx: tower and "
    help += "projector; vllm: merged, with the class that vLLM's transformers backend needs"
    export.add_argument("--to", required=True, choices=("gguf", "llava", "onnx", "vllm"), help=help)
    export.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="gguf: matrices")

    help = "a model from a projector that a notebook, LLaVA or Lightning saved"
    projector = add_command(commands, "import-projector", run_import_projector, help)
    add = projector.add_argument
    help = "its state dict, or a checkpoint with one: clipphi_proj.pth, mm_projector.bin, ..."
    add("file", metavar="FILE", help=help)
    add("folder", metavar="DIR", help="folder to write the model to")
    add("--vision_backbone", help="folder or Hub id of the vision tower (default: as in training)")
    add("--text_backbone", help="folder or Hub id of the decoder (default: as in training)")
    help = "hidden state that it was trained on (default: -2 for mm_projector.bin, as in LLaVA; else -1, the last)"
    add("--vision_feature_layer", type=int, help=help)
    add("--block", metavar="FILE", help="state dict of the residual block behind a linear layer")
    add("--adapter", metavar="DIR", help="PEFT's folder of a LoRA adapter of the decoder")

    for command in (push, export, projector):
        add_json(command)


def run_push(arguments: argparse.Namespace) -> None:
    model = choose_model(arguments)
    from ..hub.push import push

    options = {name: getattr(arguments, name) for name in ("tag", "create_pr", "merged", "message")}
    options |= {"private": arguments.private or None, "branch": arguments.revision, "images": not arguments.no_images}
    pushed = push(model, arguments.repo_id, **options)
    print(json.dumps(asdict(pushed)) if arguments.json else pushed)


def run_export(arguments: argparse.Namespace) -> None:
    model = choose_model(arguments)
    from ..export import export

    done = export(model, Path(arguments.folder), arguments.to, arguments.dtype)
    text = f"wrote {', '.join(done['files'])}; largest difference from the model {done['largest_difference']:.2g}"
    print(json.dumps(done) if arguments.json else text)


def run_import_projector(arguments: argparse.Namespace) -> None:
    from ..export.legacy_projector import import_projector
    from ..training.arguments import TEXT_BACKBONE, VISION_BACKBONE

    file, folder = arguments.file, arguments.folder
    vision, text = arguments.vision_backbone or VISION_BACKBONE, arguments.text_backbone or TEXT_BACKBONE
    more = {"layer": arguments.vision_feature_layer, "block": arguments.block, "adapter": arguments.adapter}
    done = import_projector(file, vision, text, Path(folder), **more)
    print(json.dumps(done) if arguments.json else f"wrote {folder}; try: clip-phi caption --model {folder} IMAGE")
