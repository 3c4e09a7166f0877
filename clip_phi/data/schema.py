"""Rows: one record of any layout people use, as a mapping, to the branches of a Sample.

A row has an image (or none) and one of
    conversations   [{"from": "human" | "gpt" | "system", "value"}]                    LLaVA-Instruct
    messages        [{"role": "user" | "assistant" | "system", "content"}]             chat format of transformers
    prompt, completion                                                               the same, or two texts    (TRL)
    question, answers (or answer)     answers: texts or {"answer"}; the most frequent one is learnt            VQA
    text, label           label: yes or no                                                                        POPE
    captions (caption, sentences, answer or text)                                     one text or a list: captions
content is a text or a list of {"type": "text", "text"} and {"type": "image"}. Beside a user's text may stand "speech"
(a recording that comes before the text) and "transcript" (what is said in it). If the text is empty then, the question
itself is spoken, and the text becomes SPOKEN_INSTRUCTION.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .sample import SPOKEN_INSTRUCTION, Conversation, File, Sample, Turn
from .files import MediaFolder, clean_text
from .report import RecordError, Report, Skip

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_KEYS = ("image", "images", "jpg", "jpeg", "png", "webp", "file_name", "image_path")
CAPTION_KEYS = ("captions", "caption", "sentences", "answer", "text", "txt")

# Finds an image or a recording: (value in the row, column and place in it, "image" or "speech").
Find = Callable[[Any, str, str], File | bytes]


def find_by_name(media: MediaFolder) -> Find:
    """For rows that name their media: relative to a folder, absolute, or in a zip archive there."""
    return lambda value, column, what: value if isinstance(value, bytes) else media.find(value, what)


def read_rows(
    rows: Iterable[tuple[str | list[str], Any]], find: Find, report: Report, group: bool = True
) -> Iterator[Sample]:
    """Samples of (origin, row), or of (one origin for each caption, row).

    group: bring all rows about one image together as branches of one Sample, in order of first appearance; a row that
    is there twice is skipped. Otherwise every row is a Sample of its own, given as it comes."""
    groups: dict[Any, tuple[File | bytes | None, list[Conversation], list[str]]] = {}
    seen: set[tuple[Any, Conversation]] = set()
    for origin, row in rows:
        origins = [origin] if isinstance(origin, str) else origin
        mends: list[str] = []
        try:
            value, column, conversations = _parse_row(row, find, mends)
            if len(origins) != len(conversations):
                origins = origins[:1] * len(conversations)
            image = find(value, column, "image") if value is not None else None
        except RecordError as defect:
            report.records += len(origins)
            report.skip(Skip(defect.kind, origins[0], defect.detail, len(origins)))
            continue
        report.records += len(conversations)
        good: list[tuple[Conversation, str]] = []
        for conversation, branch_origin in zip(conversations, origins, strict=True):
            if not isinstance(conversation, RecordError) and group and conversation[0].role != "assistant":  # captions may be alike
                if (image, conversation) in seen:
                    conversation = RecordError("duplicate record")
                else:
                    seen.add((image, conversation))
            if isinstance(conversation, RecordError):
                report.skip(Skip(conversation.kind, branch_origin, conversation.detail))
            else:
                good.append((conversation, branch_origin))
        if not good:
            continue
        for kind in mends:
            report.repair(kind, origins[0])
        if group:
            _, all_branches, all_origins = groups.setdefault(object() if image is None else image, (image, [], []))
            all_branches += [conversation for conversation, _ in good]
            all_origins += [branch_origin for _, branch_origin in good]
        else:
            yield Sample(image, tuple(conversation for conversation, _ in good), tuple(each for _, each in good))
    for image, all_branches, all_origins in groups.values():
        yield Sample(image, tuple(all_branches), tuple(all_origins))


def _parse_row(row: Any, find: Find, mends: list[str]) -> tuple[Any, str, list[Conversation | RecordError]]:
    """The image of a row as it stands there (None: no image), the column and place it stands in, and the branches, or
    what is wrong with them. Raises RecordError if that holds for all of the row."""
    if not isinstance(row, Mapping):
        raise RecordError("record is not an object", f"{type(row).__name__} {str(row)[:40]!r}")
    column = next((key for key in IMAGE_KEYS if row.get(key) is not None), "")
    value = row.get(column)
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise RecordError("several images", f"{len(value)} of them; a sample has one")
        column, value = f"{column}/0", value[0] if value else None
    has_image = value is not None
    if row.get("conversations") is not None:
        return value, column, [_conversation(row["conversations"], has_image, find, mends)]
    if row.get("messages") is not None:
        return value, column, [_conversation(row["messages"], has_image, find, mends)]
    if "prompt" in row and "completion" in row:
        turns = [
            [{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key]
            for key, role in (("prompt", "user"), ("completion", "assistant"))
        ]
        if not all(isinstance(part, list) for part in turns):
            raise RecordError("prompt or completion is neither text nor a list")
        return value, column, [_conversation(turns[0] + turns[1], has_image, find, mends)]
    if "question" in row and ("answers" in row or isinstance(row.get("answer"), str)):
        return value, column, [_question(row, has_image)]
    if row.get("label") in ("yes", "no") and "text" in row:
        return value, column, [_question({"question": row["text"], "answer": row["label"]}, has_image)]
    return value, column, _captions(row, has_image)


def _conversation(messages: Any, has_image: bool, find: Find, mends: list[str]) -> Conversation:
    if not isinstance(messages, list | tuple) or not messages:
        raise RecordError("conversation is not a list of turns" if messages else "conversation is empty")
    turns: list[Turn] = []
    image_turns: list[int] = []  # one entry for each <image>: the turn it stands in
    for message in messages:
        if not isinstance(message, Mapping):
            raise RecordError("turn is not an object", f"{type(message).__name__} {str(message)[:40]!r}")
        speaker = message.get("from", message.get("role"))
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise RecordError("unknown speaker", repr(speaker))
        role = ROLES[speaker]
        text, images = _text(message.get("value", message.get("content")), role)
        if role == "system" and not text:
            continue
        previous = turns[-1].role if turns else None
        if role == "system" and previous is not None:
            raise RecordError("system turn is not the first")
        if role == "assistant" and previous in (None, "system"):
            raise RecordError("first turn is an answer")
        if role == previous:
            raise RecordError("two questions in a row" if role == "user" else "two answers in a row")
        if images and role != "user":
            raise RecordError(f"{IMAGE_TOKEN} outside a question")
        image_turns += [len(turns)] * images
        transcript, speech = message.get("transcript"), message.get("speech")
        if transcript is not None or speech is not None:
            if role != "user":
                raise RecordError("speech outside a question")
            text = SPOKEN_INSTRUCTION if text is None or (isinstance(text, str) and not text.strip()) else text
        text = clean_text(text, {"user": "question", "assistant": "answer", "system": "system text"}[role])
        turns.append(
            Turn(
                role,  # type: ignore[arg-type]
                text,
                clean_text(transcript, "transcript") if transcript is not None else None,
                find(speech, "speech", "speech") if speech is not None else None,
            )
        )
    if image_turns and not has_image:
        raise RecordError(f"{IMAGE_TOKEN} without an image")
    if len(image_turns) > 1:
        raise RecordError(f"several {IMAGE_TOKEN} for one image", f"{len(image_turns)} of them")
    if not any(turn.role == "assistant" for turn in turns):
        raise RecordError("no answer")
    if turns[-1].role == "user":
        turns.pop()
        mends.append("last question has no answer, and was cut")
    first = next(index for index, turn in enumerate(turns) if turn.role == "user")
    if image_turns and image_turns[0] != first:
        mends.append("image stood in a later turn, and was put first")
    elif has_image and not image_turns and "value" in messages[0]:
        mends.append(f"image without {IMAGE_TOKEN} in the text was put first")
    return tuple(turns)


def _text(content: Any, role: str) -> tuple[Any, int]:
    """The text of a turn without <image>, and how many of these (or of image items) there were."""
    images = 0
    if isinstance(content, list | tuple):
        texts = []
        for item in content:
            kind = item.get("type") if isinstance(item, Mapping) else None
            if kind == "image":
                images += 1
            elif kind == "text":
                texts.append(item.get("text"))
            else:
                raise RecordError("content is not text or image", f"{str(item)[:40]!r}")
        if not all(isinstance(text, str) for text in texts):
            raise RecordError("content text is not text")
        content = "\n".join(text.strip() for text in texts if text.strip())
    if isinstance(content, str) and IMAGE_TOKEN in content:
        images += content.count(IMAGE_TOKEN)
        content = content.replace(IMAGE_TOKEN, "")
    if role == "system" and isinstance(content, str):
        content = content.strip()
    return content, images


def _question(row: Mapping[str, Any], has_image: bool) -> Conversation:
    answers = row["answers"] if "answers" in row else [row["answer"]]
    if not isinstance(answers, list | tuple) or not answers:
        raise RecordError("answers are not a list, or it is empty")
    texts = [clean_text(item.get("answer") if isinstance(item, Mapping) else item, "answer") for item in answers]
    (usual, _), *_ = Counter(texts).most_common(1)
    question = clean_text(row["question"], "question")
    if IMAGE_TOKEN in question.replace(IMAGE_TOKEN, "", 1) or (IMAGE_TOKEN in question and not has_image):
        raise RecordError(f"{IMAGE_TOKEN} without an image")
    question = clean_text(question.replace(IMAGE_TOKEN, ""), "question")
    references = tuple(texts) if len(texts) > 1 else ()
    return (Turn("user", question), Turn("assistant", usual, references=references))


def _captions(row: Mapping[str, Any], has_image: bool) -> list[Conversation | RecordError]:
    key = next((key for key in CAPTION_KEYS if row.get(key) is not None), None)
    if key is None:
        raise RecordError("no conversation, question or caption", f"keys {', '.join(map(str, row))[:80]}")
    captions = row[key] if isinstance(row[key], list | tuple) else [row[key]]
    if not captions:
        raise RecordError("no caption")
    if not has_image:
        raise RecordError("caption without an image")
    conversations: list[Conversation | RecordError] = []
    for caption in captions:
        text = caption.get("raw") if isinstance(caption, Mapping) else caption
        try:
            text = clean_text(text, "caption")
            if IMAGE_TOKEN in text:
                raise RecordError(f"{IMAGE_TOKEN} outside a question")
            conversations.append((Turn("assistant", text),))
        except RecordError as defect:
            conversations.append(defect)
    return conversations
