"""clip-phi push, export and import-projector: give a trained model to others, and take one in."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .common import need_checkpoint


def add_to(commands: Any) -> None:
    push = commands.add_parser("push", help="push a trained model to the Hub, with its model card")
    push.add_argument("folder", metavar="RUN", help="folder of a training run, or of a saved model")
    push.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub; it is made if it is not there")
    push.add_argument(
        "--merged", action="store_true", help="one whole checkpoint, LoRA folded in, instead of the trained weights"
    )
    push.add_argument("--private", action="store_true", help="if the repository is made: only you can see it")
    push.add_argument("--revision", metavar="BRANCH", help="push to this branch, made if need be (default: main)")
    push.add_argument("--tag", help="name the pushed commit (default: a name made from the weights' hash)")
    push.add_argument("--create_pr", action="store_true", help="offer it as a pull request")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--no_images", action="store_true", help="model card without the sample images")
    push.add_argument("--json", action="store_true", help="print a json object instead of the line")
    push.set_defaults(run=run_push)

    export = commands.add_parser("export", help="write a trained model for llama.cpp, vLLM, Llava or ONNX")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a trained model")
    export.add_argument("folder", metavar="DIR", help="where it goes")
    export.add_argument(
        "--to",
        required=True,
        choices=("gguf", "llava", "onnx", "vllm"),
        help="gguf: text model and mmproj for llama.cpp; llava: stock LlavaForConditionalGeneration; onnx: tower and "
        "projector; vllm: merged, with the class that vLLM's transformers backend asks for",
    )
    export.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of gguf's matrices (default: %(default)s)"
    )
    export.add_argument("--json", action="store_true", help="print a json object instead of the line")
    export.set_defaults(run=run_export)

    take = commands.add_parser("import-projector", help="make a checkpoint of a linear layer saved by a notebook")
    take.add_argument("file", metavar="FILE", help="a .pth of its state dict, for example clipphi_proj.pth")
    take.add_argument("folder", metavar="DIR", help="where the checkpoint goes")
    take.add_argument("--vision_backbone", help="Hub id or folder of the vision tower (default: that of training)")
    take.add_argument("--text_backbone", help="Hub id or folder of the decoder (default: that of training)")
    take.add_argument(
        "--vision_feature_layer",
        type=int,
        default=-1,
        help="hidden state that it was trained on (default: %(default)s, the last, as in the notebooks)",
    )
    take.add_argument("--json", action="store_true", help="print a json object instead of the line")
    take.set_defaults(run=run_import_projector)


def run_push(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from ..hub.push import Target, push

    pushed = push(
        arguments.folder,
        Target(
            arguments.repo_id,
            private=arguments.private or None,
            branch=arguments.revision,
            tag=arguments.tag,
            create_pr=arguments.create_pr,
        ),
        merged=arguments.merged,
        message=arguments.message,
        images=not arguments.no_images,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(asdict(pushed)) if arguments.json else pushed)


def run_export(arguments: argparse.Namespace) -> None:
    need_checkpoint(arguments.checkpoint)
    from ..export import export

    done = export(arguments.checkpoint, Path(arguments.folder), arguments.to, arguments.dtype)
    if arguments.json:
        print(json.dumps(done))
    else:
        print(f"wrote {', '.join(done['files'])}; largest difference from the model {done['largest_difference']:.2g}")


def run_import_projector(arguments: argparse.Namespace) -> None:
    from ..export.legacy_projector import import_projector
    from ..training.arguments import TEXT_BACKBONE, VISION_BACKBONE

    done = import_projector(
        arguments.file,
        arguments.vision_backbone or VISION_BACKBONE,
        arguments.text_backbone or TEXT_BACKBONE,
        arguments.vision_feature_layer,
        Path(arguments.folder),
    )
    print(
        json.dumps(done)
        if arguments.json
        else f"wrote {arguments.folder}; try: clip-phi caption --checkpoint {arguments.folder} IMAGE"
    )
