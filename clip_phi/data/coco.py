"""COCO: captions in the official json of 2017 (or 2014) and in the Karpathy split, and the questions of VQA v2."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import MediaFolder, coco_names, read_json
from .report import RecordError, Report
from .sample import File, Sample
from .schema import read_records

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def read_coco_captions(annotations: Path, media: MediaFolder, report: Report) -> Iterator[Sample]:
    """One Sample for each image that has captions, each caption a conversation. In the order of the file.

    annotations: the official json, {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]};
    or without annotations, as of test images: an empty conversation each, to evaluate on.
    media: the folder of its images, or the one above it; either may hold the zip archive that they come as.
    Raises ValueError if the file is of another form. What is wrong with a record goes to the report."""
    content = read_json(annotations, "COCO captions file", ("images",))
    is_captioned = "annotations" in content
    if not isinstance(content.setdefault("annotations", []), list):
        raise ValueError(f"{annotations} is not a COCO captions file: it needs a list 'annotations'")

    def unique(key: str, what: str, required: str) -> Iterator[tuple[str, dict[str, Any]]]:
        ids: set[Any] = set()
        for origin, record in _entries(annotations, content, key):
            number = record.get("id")
            if not _is_id(record.get(required)):
                report.reject(f"{what} without {required!r}", origin)
            elif _is_id(number) and number in ids:
                report.reject(f"duplicate {what} id", origin, str(number))
            else:
                ids.add(number if _is_id(number) else origin)
                yield origin, record

    captions: dict[Any, list[tuple[str, Any]]] = {}
    for origin, record in unique("annotations", "caption", "image_id"):
        captions.setdefault(record["image_id"], []).append((origin, record.get("caption")))

    def records() -> Iterator[tuple[list[str], dict[str, Any]]]:
        for _, record in unique("images", "image", "id"):
            if record["id"] in captions:
                origins, texts = map(list, zip(*captions.pop(record["id"]), strict=True))
                # An entry that does not name its file is still an image: a missing one.
                yield origins, {"file_name": record.get("file_name", ""), "captions": texts, "id": record["id"]}
        for image_id, left in captions.items():
            for origin, _ in left:
                report.reject("caption of an image that is not listed", origin, str(image_id))

    def find(name: Any, column: str, what: str) -> File:
        folder = annotations.stem.removeprefix("captions_").removeprefix("image_info_")
        return media.find(name, os.path.join(folder, str(name)))

    if is_captioned:
        yield from read_records(records(), find, report)
        return
    for number, (origin, record) in enumerate(unique("images", "image", "id")):
        try:
            image = find(record.get("file_name", ""), "", "image")
        except RecordError as error:
            report.reject(error.kind, origin, error.detail)
            continue
        report.records += 1
        yield Sample(image, ((),), (origin,), ((number, record["id"]),))


def read_karpathy_split(annotations: Path, media: MediaFolder, split: str, report: Report) -> Iterator[Sample]:
    """One Sample for each image of a split: train (with restval), val or test, which share no image.

    annotations: dataset_coco.json, {"images": [{"filename", "filepath", "cocoid", "split", "sentences": [{"raw"}]}]}
    (Karpathy and Fei-Fei 2015, arXiv 1412.2306). media: the folder that holds train2014/ and val2014/, or train2017/
    and val2017/, which are the same images. Raises ValueError for another split or a file of another form."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: it is one of {', '.join(SPLITS)}")
    content = read_json(annotations, "Karpathy split", ("images",))

    def records() -> Iterator[tuple[str, Any]]:
        for origin, record in _entries(annotations, content, "images"):
            known = record.get("split")
            if known not in sum(SPLITS.values(), ()):
                report.reject("image without a known split", origin, repr(known))
            elif known in SPLITS[split]:
                yield origin, {"image": record, "captions": record.get("sentences"), "id": record.get("cocoid")}

    def find(record: Any, column: str, what: str) -> Any:
        name = record.get("filename")
        return media.find(f"{record.get('filepath')}/{name}", name, *coco_names(record.get("cocoid")))

    yield from read_records(records(), find, report)


def read_instances(annotations: Path) -> tuple[list[str], dict[int | str, list[tuple[str, list[float]]]]]:
    """The categories; and for each image, by its id and by its file's name, the category and bbox of each object.

    A crowd's bbox is empty. annotations: the official json, {"images": [{"id", "file_name"}], "categories": [{"id",
    "name"}], "annotations": [{"image_id", "category_id", "bbox", "iscrowd"}]}. Raises ValueError for another form, or
    if a category or image is missing."""
    content = read_json(annotations, "COCO instances file", ("images", "annotations", "categories"))
    try:
        categories = {each["id"]: str(each["name"]) for each in content["categories"]}
        found: dict[int | str, list[tuple[str, list[float]]]] = {each["id"]: [] for each in content["images"]}
        for each in content["annotations"]:
            box = [] if each.get("iscrowd") else each["bbox"]
            found[each["image_id"]].append((categories[each["category_id"]], box))
        names = {os.path.basename(each["file_name"]): found[each["id"]] for each in content["images"]}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{annotations} is not a COCO instances file: an entry lacks or misses {error}") from error
    return list(categories.values()), found | names


def read_vqa(questions: Path, annotations: str | None, media: MediaFolder, report: Report) -> Iterator[Sample]:
    """One Sample for each image, each question a conversation: the most frequent answer is learnt. Without annotations
    the questions have no answers: they can be evaluated on, not trained on.

    questions: {"data_subtype": "val2014", "questions": [{"question_id", "image_id", "question"}]}; annotations:
    {"annotations": [{"question_id", "answers": [{"answer"}]}]} (Goyal et al. 2017, arXiv 1612.00837). media: the folder
    that holds val2014/, or train2017/ and val2017/. Raises ValueError for a file of another form."""
    content = read_json(questions, "VQA file", ("questions",))
    answers: dict[Any, Any] = {}
    if annotations is not None:
        annotated = read_json(Path(annotations), "VQA file", ("annotations",))
        for _, record in _entries(questions, annotated, "annotations"):
            if isinstance(record.get("question_id"), int | str):
                answers[record["question_id"]] = record.get("answers")
    subtype = content.get("data_subtype", "val2014")

    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        for origin, record in _entries(questions, content, "questions"):
            number, image_id = record.get("question_id"), record.get("image_id")
            has_ids = isinstance(number, int | str) and isinstance(image_id, int)
            if has_ids and (annotations is None or number in answers):
                known = {"image": image_id, "question": record.get("question"), "question_id": number}
                yield origin, known | ({"answers": answers[number]} if number in answers else {})
            else:
                report.reject("question without id, image_id or annotation", origin, repr(number))

    def find(image_id: int, column: str, what: str) -> Any:
        name = f"COCO_{subtype}_{image_id:012d}.jpg"
        return media.find(f"{subtype}/{name}", name, *coco_names(image_id))

    yield from read_records(records(), find, report)


def _entries(path: Path, content: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(origin, entry) of a list in a file. What is no object counts as an empty one."""
    for index, entry in enumerate(content[key]):
        yield f"{path}:{key}[{index}]", entry if isinstance(entry, dict) else {}


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)  # True would be 1
