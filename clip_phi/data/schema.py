"""One record of any layout that people use, as a mapping, to the conversations of a Sample.

A record has an image (or none) and one of
    conversations   [{"from": "human" | "gpt" | "system", "value"}]                    LLaVA-Instruct
    messages        [{"role": "user" | "assistant" | "system", "content"}]             chat format of transformers
    prompt, completion                                                               the same, or two texts    (TRL)
    question, answers (or answer)     answers: texts or {"answer"}; the most frequent one is learnt            VQA
    text, label           label: yes or no                                                                        POPE
    captions (caption, sentences, answer or text)                                     one text or a list: captions
content is a text or a list of {"type": "text", "text"} and {"type": "image"}. Beside a user's text may be "speech" (a
recording, whose transcript precedes the text) and "transcript" (what is said in it). Without a text the question itself
is spoken, and the text becomes SPOKEN_INSTRUCTION.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .files import clean_text
from .report import RecordError, Report, Skip
from .sample import SPOKEN_INSTRUCTION, Conversation, File, Sample, Turn

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TEXT_NAMES = {"user": "question", "assistant": "answer", "system": "system text"}  # in errors
IMAGE_KEYS = ("image", "images", "jpg", "jpeg", "png", "webp", "file_name", "image_path")
CAPTION_KEYS = ("captions", "caption", "sentences", "answer", "text", "txt")

# Finds an image or a recording: (value in the record, column and place in it, "image" or "speech").
Find = Callable[[Any, str, str], File | bytes]


def read_records(
    records: Iterable[tuple[str | list[str], Any]], find: Find, report: Report, group: bool = True
) -> Iterator[Sample]:
    """Samples of (origin, record), or of (one origin for each caption, record).

    group: make one Sample of all records about one image, in order of first appearance, and skip a record that is
    there twice. Otherwise every record is a Sample of its own."""
    groups: dict[Any, tuple[File | bytes | None, list[tuple[Conversation, str]]]] = {}
    seen: set[tuple[Any, Conversation]] = set()
    for origin, record in records:
        origins = [origin] if isinstance(origin, str) else origin
        repairs: list[str] = []
        try:
            value, column, conversations = _parse(record, find, repairs)
            if len(origins) != len(conversations):
                origins = origins[:1] * len(conversations)
            image = find(value, column, "image") if value is not None else None
        except RecordError as error:
            report.reject(error.kind, origins[0], error.detail, len(origins))
            continue
        report.records += len(conversations)
        good: list[tuple[Conversation, str]] = []
        for conversation, its_origin in zip(conversations, origins, strict=True):
            if isinstance(conversation, RecordError):
                report.skip(Skip(conversation.kind, its_origin, conversation.detail))
            elif seen and (image, conversation) in seen:
                report.skip(Skip("duplicate record", its_origin, ""))
            else:
                good.append((conversation, its_origin))
                if group and conversation[0].role != "assistant":  # captions may be alike
                    seen.add((image, conversation))
        if not good:
            continue
        for kind in repairs:
            report.repair(kind, origins[0])
        if group:
            groups.setdefault(object() if image is None else image, (image, []))[1].extend(good)
        else:
            yield Sample(image, *zip(*good, strict=True))
    for image, all_of_it in groups.values():
        yield Sample(image, *zip(*all_of_it, strict=True))


def _parse(record: Any, find: Find, repairs: list[str]) -> tuple[Any, str, list[Conversation | RecordError]]:
    """The image of a record as it is there (None: no image), its column and place, and the conversations, or what is
    wrong with them. Raises RecordError if that holds for all of the record."""
    if not isinstance(record, Mapping):
        raise RecordError("record is not an object", f"{type(record).__name__} {str(record)[:40]!r}")
    column = next((key for key in IMAGE_KEYS if record.get(key) is not None), "")
    value = record.get(column)
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise RecordError("several images", f"{len(value)} of them; a sample has one")
        column, value = f"{column}/0", value[0] if value else None
    has_image = value is not None
    for key in ("conversations", "messages"):
        if record.get(key) is not None:
            return value, column, [_conversation(record[key], has_image, find, repairs)]
    if "prompt" in record and "completion" in record:
        parts = [
            [{"role": role, "content": record[key]}] if isinstance(record[key], str) else record[key]
            for key, role in (("prompt", "user"), ("completion", "assistant"))
        ]
        if not all(isinstance(part, list) for part in parts):
            raise RecordError("prompt or completion is neither text nor a list")
        return value, column, [_conversation(parts[0] + parts[1], has_image, find, repairs)]
    if "question" in record and ("answers" in record or isinstance(record.get("answer"), str)):
        answers = record["answers"] if "answers" in record else [record["answer"]]
        return value, column, [_question(record["question"], answers, has_image)]
    if record.get("label") in ("yes", "no") and "text" in record:
        return value, column, [_question(record["text"], [record["label"]], has_image)]
    return value, column, _captions(record, has_image)


def _conversation(messages: Any, has_image: bool, find: Find, repairs: list[str]) -> Conversation:
    if not isinstance(messages, list | tuple) or not messages:
        raise RecordError("conversation is not a list of turns" if messages else "conversation is empty")
    turns: list[Turn] = []
    image_turns: list[int] = []  # for each <image>, the turn that it is in
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
        text = clean_text(text, TEXT_NAMES[role])
        transcript = clean_text(transcript, "transcript") if transcript is not None else None
        recording = find(speech, "speech", "speech") if speech is not None else None
        turns.append(Turn(role, text, transcript, recording))  # type: ignore[arg-type]
    if image_turns and not has_image:
        raise RecordError(f"{IMAGE_TOKEN} without an image")
    if len(image_turns) > 1:
        raise RecordError(f"several {IMAGE_TOKEN} for one image", f"{len(image_turns)} of them")
    if not any(turn.role == "assistant" for turn in turns):
        raise RecordError("no answer")
    if turns[-1].role == "user":
        turns.pop()
        repairs.append("last question has no answer, and was cut")
    first = next(index for index, turn in enumerate(turns) if turn.role == "user")
    if image_turns and image_turns[0] != first:
        repairs.append("image stood in a later turn, and was put first")
    elif has_image and not image_turns and "value" in messages[0]:
        repairs.append(f"image without {IMAGE_TOKEN} in the text was put first")
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


def _question(question: Any, answers: Any, has_image: bool) -> Conversation:
    if not isinstance(answers, list | tuple) or not answers:
        raise RecordError("answers are not a list, or it is empty")
    texts = [clean_text(item.get("answer") if isinstance(item, Mapping) else item, "answer") for item in answers]
    (usual, _), *_ = Counter(texts).most_common(1)
    question = clean_text(question, "question")
    if question.count(IMAGE_TOKEN) > has_image:
        raise RecordError(f"{IMAGE_TOKEN} without an image")
    question = clean_text(question.replace(IMAGE_TOKEN, ""), "question")
    return (Turn("user", question), Turn("assistant", usual, references=tuple(texts) if len(texts) > 1 else ()))


def _captions(record: Mapping[str, Any], has_image: bool) -> list[Conversation | RecordError]:
    key = next((key for key in CAPTION_KEYS if record.get(key) is not None), None)
    if key is None:
        raise RecordError("no conversation, question or caption", f"keys {', '.join(map(str, record))[:80]}")
    captions = record[key] if isinstance(record[key], list | tuple) else [record[key]]
    if not captions:
        raise RecordError("no caption")
    if not has_image:
        raise RecordError("caption without an image")
    conversations: list[Conversation | RecordError] = []
    for caption in captions:
        try:
            text = clean_text(caption.get("raw") if isinstance(caption, Mapping) else caption, "caption")
            if IMAGE_TOKEN in text:
                raise RecordError(f"{IMAGE_TOKEN} outside a question")
            conversations.append((Turn("assistant", text),))
        except RecordError as error:
            conversations.append(error)
    return conversations
