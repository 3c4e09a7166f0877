"""Conversations in a json list or a jsonl file: LLaVA-Instruct, and every other layout of rows.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from .sample import Sample
from .coco import find_first, names_of_2017
from .files import MediaFolder, read_json
from .report import Report, Skip
from .schema import read_rows
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .sample import Sample
from .files import MediaFolder, read_json
from .report import Report, Skip
from .schema import find_by_name, read_rows


def read_instruct(annotations: Path, media: MediaFolder, report: Report) -> Iterator[Sample]:
    """One Sample for each image: the conversations about it are its branches. In the order of first appearance.

    annotations: llava_instruct_150k.json, the 665K mix, or any json list or jsonl file (POPE's are called .json) of
    such records. The image comes
    first in the prompt, wherever <image> stands in the first question. A record without an image is a Sample of its
    own. Raises ValueError if the file is not of this form; what is wrong with a record goes to the report."""
    read = _lines if annotations.suffix == ".jsonl" or _has_lines(annotations) else _items
    yield from read_rows(read(annotations, report), find_by_name(media), report)


def _items(path: Path, report: Report) -> Iterator[tuple[str, Any]]:
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path} is not a list of records")
    return ((f"{path}:{index}", record) for index, record in enumerate(records))


def _has_lines(path: Path) -> bool:
    """Whether the first line of a file is a whole object, and not the only one."""
    try:
        with open(path, "rb") as file:
            first, second = file.readline(), file.readline()
        return second.startswith(b"{") and isinstance(json.loads(first), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _lines(path: Path, report: Report) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                report.records += 1
                report.skip(Skip("line is not json", f"{path}:{number}", str(error)))


def read_vqa(questions: Path, annotations: Path | None, media: MediaFolder, report: Report) -> Iterator[Sample]:
    """One Sample for each image, its questions as branches: the most frequent answer is learnt, all are references.

    questions: {"data_subtype": "val2014", "questions": [{"question_id", "image_id", "question"}]}; annotations:
    {"annotations": [{"question_id", "answers": [{"answer"}]}]} (Goyal et al. 2017, arXiv 1612.00837). media: the folder
    that holds val2014/ or, with the same images, train2017/ and val2017/. Raises ValueError for a file of another form
    or missing annotations; what is wrong with a record goes to the report."""
    if annotations is None:
        raise ValueError(f"{questions} has no answers: add annotations=FILE, the json with 'annotations'")
    content, answers_content = read_json(questions), read_json(annotations)
    for path, value, key in ((questions, content, "questions"), (annotations, answers_content, "annotations")):
        if not isinstance(value, dict) or not isinstance(value.get(key), list):
            raise ValueError(f"{path} is not a VQA file: it needs a list {key!r}")
    answers = {
        record["question_id"]: record.get("answers")
        for record in answers_content["annotations"]
        if isinstance(record, dict) and isinstance(record.get("question_id"), int | str)
    }
    subtype = content.get("data_subtype", "val2014")

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for index, record in enumerate(content["questions"]):
            origin = f"{questions}:questions[{index}]"
            number = record.get("question_id") if isinstance(record, dict) else None
            if (
                not isinstance(number, int | str)
                or number not in answers
                or not isinstance(record.get("image_id"), int)
            ):
                report.records += 1
                report.skip(Skip("question without id, image_id or annotation", origin, repr(number)))
            else:
                row = {"image": record["image_id"], "question": record.get("question"), "answers": answers[number]}
                yield origin, row

    def find(image_id: int, column: str, what: str) -> Any:
        name = f"COCO_{subtype}_{image_id:012d}.jpg"
        return find_first(media, [f"{subtype}/{name}", name, f"{image_id:012d}.jpg", *names_of_2017(image_id)])

    yield from read_rows(rows(), find, report)
