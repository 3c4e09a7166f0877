"""Conversations in a json list or a jsonl file: LLaVA-Instruct, and every other layout of schema.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import MediaFolder, read_json
from .report import Report
from .sample import Sample
from .schema import ANY_LAYOUT, Layout, read_records


def read_instruct(
    annotations: Path, media: MediaFolder, report: Report, layout: Layout = ANY_LAYOUT
) -> Iterator[Sample]:
    """One Sample for each image, with the conversations about it. In the order of first appearance.

    annotations: llava_instruct_150k.json, the 665K mix, or any json list or jsonl file (POPE's are called .json) of
    such records; or an object with one such list ("data" of TextVQA), or of records by id (GQA). The image comes first
    in the prompt, wherever <image> is in the first question. A record without an image is a Sample of its own. Raises
    ValueError if the file is of another form. What is wrong with a record goes to the report."""
    if annotations.suffix == ".jsonl" or has_lines(annotations):
        records = _lines(annotations, report)
    else:
        name, content = str(annotations), read_json(annotations)
        items = content.items() if isinstance(content, dict) else ()
        lists = [pair for pair in items if isinstance(pair[1], list) and pair[1] and isinstance(pair[1][0], dict)]
        if len(lists) == 1:
            name, content = f"{name}:{lists[0][0]}", lists[0][1]
        if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
            records = ((f"{name}:{key}", {"question_id": key} | record) for key, record in content.items())
        elif isinstance(content, list):
            records = ((f"{name}:{index}", record) for index, record in enumerate(content))
        else:
            raise ValueError(f"{annotations} is not a list of records, nor an object with one such list")
    yield from read_records(records, media.find_value, report, layout=layout)


def has_lines(path: Path) -> bool:
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
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    report.reject("line is not json", f"{path}:{number}", str(error))
