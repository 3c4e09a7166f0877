"""COCO 2017 captions: annotations/captions_{train,val}2017.json beside a folder of images."""

from pathlib import Path

from ..samples import Sample, Turn
from .records import image_path, read_json


def read_coco_captions(annotations: Path, images: Path) -> list[Sample]:
    """One Sample for each image that has captions; each of its captions is a branch. In the order of the file.

    annotations: the official json, {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.
    Raises FileNotFoundError for a missing json, folder or image, ValueError for a record that is not of this form."""
    content = read_json(annotations)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{annotations} is not a COCO captions file: it needs the keys 'images' and 'annotations'")
    captions: dict[int, list[str]] = {}
    for index, record in enumerate(content["annotations"]):
        try:
            caption = record["caption"].strip()
            image_id = record["image_id"]
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{annotations}:annotations[{index}] needs 'image_id' and a text 'caption'") from None
        if not caption:
            raise ValueError(f"{annotations}:annotations[{index}] (image {image_id}) has an empty caption")
        captions.setdefault(image_id, []).append(caption)
    samples = []
    for index, record in enumerate(content["images"]):
        origin = f"{annotations}:images[{index}]"
        if not isinstance(record, dict) or not {"id", "file_name"} <= record.keys():
            raise ValueError(f"{origin} needs 'id' and 'file_name'")
        if record["id"] in captions:
            branches = tuple((Turn("assistant", caption),) for caption in captions.pop(record["id"]))
            samples.append(Sample(image_path(images, record["file_name"], origin), branches, origin))
    if captions:
        raise ValueError(
            f"{annotations} has captions for images that it does not list, e.g. image {next(iter(captions))}"
        )
    return samples
