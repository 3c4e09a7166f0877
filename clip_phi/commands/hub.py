"""clip-phi push, export and import-projector: models to the Hub and to other programs, and from them."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from .common import choose_model


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

    done = export(model, Path(arguments.folder), arguments.to, arguments.dtype, arguments.packages)
    checked = [f"{done['tensors']} tensors read back"] if "tensors" in done else []
    if "largest_difference" in done:
        checked.append(f"largest difference from the model {done['largest_difference']:.2g}")
    print(json.dumps(done) if arguments.json else f"wrote {', '.join(done['files'])}; {', '.join(checked)}")


def run_import_projector(arguments: argparse.Namespace) -> None:
    from ..export.legacy_projector import import_projector
    from ..training.arguments import TEXT_BACKBONE, VISION_BACKBONE

    file, folder = arguments.file, arguments.folder
    vision, text = arguments.vision_backbone or VISION_BACKBONE, arguments.text_backbone or TEXT_BACKBONE
    more = {"layer": arguments.vision_feature_layer, "block": arguments.block, "adapter": arguments.adapter}
    done = import_projector(file, vision, text, Path(folder), **more)
    print(json.dumps(done) if arguments.json else f"wrote {folder}; try: clip-phi caption --model {folder} IMAGE")
