"""COCO captions: the official json of 2017 (or 2014), and the Karpathy split of it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .sample import Sample
from .files import MediaFolder, read_json
from .report import RecordError, Report, Skip
from .schema import read_rows

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def read_coco_captions(annotations: Path, media: MediaFolder, report: Report) -> Iterator[Sample]:
    """One Sample for each image that has captions; each of its captions is a branch. In the order of the file.

    annotations: the official json, {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}.
    media: the folder of its images, or the one above it; either may hold the zip archive that they come as.
    Raises ValueError if the file is not of this form; what is wrong with a record goes to the report."""
    content = read_json(annotations)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise ValueError(f"{annotations} is not a COCO captions file: it needs lists 'images' and 'annotations'")
    captions: dict[Any, tuple[list[Any], list[str]]] = {}
    ids: set[Any] = set()
    for index, record in enumerate(content["annotations"]):
        origin = f"{annotations}:annotations[{index}]"
        try:
            if not isinstance(record, dict) or not is_id(record.get("image_id")):
                raise RecordError("caption without 'image_id'")
            if is_id(record.get("id")):
                if record["id"] in ids:
                    raise RecordError("duplicate caption id", str(record["id"]))
                ids.add(record["id"])
        except RecordError as defect:
            _skip(report, defect, origin)
        else:
            texts, origins = captions.setdefault(record["image_id"], ([], []))
            texts.append(record.get("caption"))
            origins.append(origin)

    def rows() -> Iterator[tuple[list[str], dict[str, Any]]]:
        listed = set()
        for index, record in enumerate(content["images"]):
            origin = f"{annotations}:images[{index}]"
            if not isinstance(record, dict) or not is_id(record.get("id")):
                _skip(report, RecordError("image entry without 'id'"), origin)
            elif record["id"] in listed:
                _skip(report, RecordError("duplicate image id", str(record["id"])), origin)
            else:
                listed.add(record["id"])
                if record["id"] in captions:
                    texts, origins = captions.pop(record["id"])
                    # An entry that does not name its file is still an image: a missing one.
                    yield origins, {"image": record.get("file_name", ""), "captions": texts}
        for image_id, (_, origins) in captions.items():
            for origin in origins:
                _skip(report, RecordError("caption of an image that is not listed", str(image_id)), origin)

    folder = annotations.stem.removeprefix("captions_")
    yield from read_rows(
        rows(), lambda name, column, what: find_first(media, [name, os.path.join(folder, str(name))]), report
    )


def read_karpathy_split(annotations: Path, media: MediaFolder, split: str, report: Report) -> Iterator[Sample]:
    """One Sample for each image of a split: train (with restval), val or test, which share no image.

    annotations: dataset_coco.json, {"images": [{"filename", "filepath", "cocoid", "split", "sentences": [{"raw"}]}]}
    (Karpathy and Fei-Fei 2015, arXiv 1412.2306). media: the folder that holds train2014/ and val2014/, or train2017/
    and val2017/, which are the same images. Raises ValueError for another split or a file of another form."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: it is one of {', '.join(SPLITS)}")
    content = read_json(annotations)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{annotations} is not a Karpathy split: it needs a list 'images'")

    def rows() -> Iterator[tuple[str, Any]]:
        for index, record in enumerate(content["images"]):
            origin = f"{annotations}:images[{index}]"
            known = record.get("split") if isinstance(record, dict) else None
            if known not in sum(SPLITS.values(), ()):
                report.records += 1
                report.skip(Skip("image without a known split", origin, repr(known)))
            elif known in SPLITS[split]:
                yield origin, {"image": record, "captions": record.get("sentences")}

    def find(record: Any, column: str, what: str) -> Any:
        names = [f"{record.get('filepath')}/{record.get('filename')}", record.get("filename")]
        return find_first(media, [*names, *names_of_2017(record.get("cocoid"))])

    yield from read_rows(rows(), find, report)


def is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)  # True would be 1


def names_of_2017(image_id: Any) -> list[str]:
    """Where an image of COCO 2014 is found in the folders of 2017: the same images, divided otherwise."""
    return [f"{folder}/{image_id:012d}.jpg" for folder in ("train2017", "val2017")] if isinstance(image_id, int) else []


def find_first(media: MediaFolder, names: list[Any]) -> Any:
    """The first of these names that is there. Raises the RecordError of the first name if none is."""
    problems = []
    for name in names:
        try:
            return media.find(name)
        except RecordError as defect:
            problems.append(defect)
    raise problems[0]


def _skip(report: Report, defect: RecordError, origin: str) -> None:
    report.records += 1
    report.skip(Skip(defect.kind, origin, defect.detail))
