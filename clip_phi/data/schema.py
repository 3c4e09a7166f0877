"""One record of any layout that people use, as a mapping, to the conversations of a Sample.

docs/data.md has an example of each layout. Names of columns are read in any case. Answers are texts, numbers, booleans,
{"answer"}, or lists of them; the most frequent one is learnt. Beside a user's text may be "speech" (a recording, whose
transcript precedes the text) and "transcript" (what is said in it). Without a text the question itself is spoken, and
the text becomes SPOKEN_INSTRUCTION. Layout names the columns of everything else. What may be read in two ways is
refused: a question is never dropped."""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .files import clean_text
from .report import RecordError, Report, Skip
from .sample import SPOKEN_INSTRUCTION, Conversation, File, Images, Sample, Turn

IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TEXT_NAMES = {"user": "question", "assistant": "answer", "system": "system text"}  # in errors
# The first that a record has is its image: content, then names, then ids.
IMAGE_KEYS: tuple[str, ...] = ("image", "images", "jpg", "jpeg", "png", "webp", "img", "file_name", "image_path")
IMAGE_KEYS += ("img_path", "image_file", "image_name", "filename", "image_url", "image_id", "imageid")
CONVERSATION_KEYS = ("conversations", "messages", "texts", "conversation")
QUESTION_KEYS = ("question", "query", "instruction", "prompt", "prefix", "input")
ANSWER_KEYS = ("answers", "answer", "multiple_choice_answer", "response", "output", "completion", "suffix", "label")
CAPTION_KEYS = ("captions", "caption", "sentences", "text", "txt")
COLUMNS = ("image", "question", "answer", "caption", "conversations")  # what Layout.columns may name
RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")  # of FineVision
# Columns that are not left unread beside a caption, to which they may be the question; beside a question that has an
# answer, or a conversation; and beside a question without one.
BESIDE_CAPTION = (
    "question|query|instruct|prompt|problem|input|answer|response|output|label|choice|option|caption|^te?xt$"
)
BESIDE_ANSWER = f"^({'|'.join(QUESTION_KEYS)}|choices?|options?|[a-d])$"
BESIDE_QUESTION = f"{BESIDE_ANSWER}|caption|sentences|^te?xt$"
IMAGE_LIKE = re.compile(r"(^|_)(im(age|g)s?|photos?|pictures?|frames?)(_?(path|file|name|url|0|1))?$")
TEXT_KEYS = {*CONVERSATION_KEYS, *QUESTION_KEYS, *ANSWER_KEYS, *CAPTION_KEYS}  # whose values are no images
OTHER_MEDIA = re.compile("(video|audio)s?(_|$)")
LEADING_IMAGES = re.compile(rf"(\s*{IMAGE_TOKEN})*((?!{IMAGE_TOKEN}).)*", re.DOTALL)
OTHER_TAGS = re.compile("<(video|audio|bbox|ref-object|img)>")
IMAGE_FILE = re.compile(r"(?i)data:image|\S.*\.(jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf]|hif)$")
ASKS_YES_OR_NO = re.compile(
    r"(?ims)(^|, )(is|are|was|were|do|does|did|can|could|has|have|had|will|would|should|may)\b.*\?"
)

# Finds an image or a recording: (value in the record, column and place in it, "image" or "speech").
Find = Callable[[Any, str, str], File | bytes]
Records = Iterable[tuple[str | list[str], Any]]  # (origin, record), or (one origin for each caption, record)
Found = Conversation | RecordError
WithPlace = tuple[Conversation, str, tuple[int, Any]]  # its origin, and its entry in Sample.ids


class Layout(NamedTuple):
    """How records are read where their names do not say it.

    columns: the column of each of COLUMNS that is named; no other column but the image's is then read.
    independent_turns: each question with its answer becomes a conversation of its own.
    min_ratings: of RATINGS, or "rating" for all four; turns of `texts` with a lower one are left out."""

    columns: Mapping[str, str] = {}
    independent_turns: bool = False
    min_ratings: Mapping[str, float] = {}


ANY_LAYOUT = Layout()


def read_records(
    records: Records, find: Find, report: Report, group: bool = True, layout: Layout = ANY_LAYOUT
) -> Iterator[Sample]:
    """Their Samples. group: make one Sample of all records about one image, in order of first appearance, and skip a
    record that is there twice. Otherwise every record is a Sample of its own."""
    groups: dict[Any, list[WithPlace]] = {}  # by image; by number if there is none
    seen: set[tuple[Any, Conversation, Any]] = set()
    for number, (origin, record) in enumerate(records):
        origins = [origin] if isinstance(origin, str) else origin
        reader = _RecordReader(find, layout)
        try:
            conversations = reader.read(record)
            if layout.independent_turns:
                conversations = [part for each in conversations for part in _split_turns(each)]
            if len(origins) != len(conversations):
                origins = origins[:1] * len(conversations) or origins
            image = reader.find_images() if conversations else None
        except RecordError as error:
            report.reject(error.kind, origins[0], error.detail, len(origins))
            continue
        report.records += len(conversations)
        if reader.filtered:
            report.filter("turn with a rating below the least one", origins[0], reader.filtered)
        good: list[WithPlace] = []
        question_id, image_id = record.get("question_id"), record.get("image_id", record.get("id"))
        key = question_id if isinstance(question_id, int | str) else None  # equal questions may have two ids
        for conversation, its_origin in zip(conversations, origins, strict=False):
            if isinstance(conversation, RecordError):
                report.skip(Skip(conversation.kind, its_origin, conversation.detail))
            elif seen and (image, conversation, key) in seen:
                report.skip(Skip("duplicate record", its_origin, ""))
            else:
                is_caption = conversation[0].role == "assistant"
                good.append((conversation, its_origin, (number, image_id if is_caption else question_id)))
                if group and not is_caption:  # captions may be alike
                    seen.add((image, conversation, key))
        if not good:
            continue
        for kind in reader.repairs:
            report.repair(kind, origins[0])
        if group:
            groups.setdefault(number if image is None else image, []).extend(good)
        else:
            yield Sample(image, *zip(*good, strict=True))
    for key, all_of_it in groups.items():
        yield Sample(None if isinstance(key, int) else key, *zip(*all_of_it, strict=True))


def _split_turns(conversation: Found) -> list[Found]:
    if isinstance(conversation, RecordError) or len(conversation) < 3:
        return [conversation]
    first = int(conversation[0].role == "system")
    return [(*conversation[:first], *conversation[at : at + 2]) for at in range(first, len(conversation), 2)]


class _RecordReader:
    """Reads one record, with read(). What it finds beside the conversations:

    images: as they are in the record, each with its column and place.
    repairs: kinds of repair. filtered: the number of turns that min_ratings leaves out."""

    def __init__(self, find: Find, layout: Layout):
        self.find, self.layout = find, layout
        self.images: list[tuple[Any, str]] = []
        self.repairs: list[str] = []
        self.filtered = 0
        self.images_lead = True  # whether every <image> of a question precedes its text

    def find_images(self) -> Images | None:
        found = [self.find(value, column, "image") for value, column in self.images]
        return tuple(found) if len(found) > 1 else next(iter(found), None)

    def read(self, record: Any) -> list[Found]:
        """The conversations, or what is wrong with them. Raises RecordError if that holds for all of the record."""
        if not isinstance(record, Mapping):
            raise RecordError("record is not an object", f"{type(record).__name__} {str(record)[:40]!r}")
        self.record = record
        names = {str(key).lower(): key for key in record}
        columns = self.layout.columns
        if absent := [column for column in columns.values() if column not in record]:
            raise RecordError(f"no column {absent[0]!r}", f"columns {', '.join(map(str, record))[:200]}")
        if columns:
            images = {key: name for key, name in names.items() if key in IMAGE_KEYS and "image" not in columns}
            fields = {"answer": "answers", "caption": "captions"}
            names = images | {fields.get(key, key): name for key, name in columns.items()}
        self.values = values = {key: record[name] for key, name in names.items()}
        self.filled = {key: None for key, value in values.items() if not _is_blank(value)}
        if media := next(filter(OTHER_MEDIA.match, self.filled), None):
            raise RecordError("video or audio", f"column {names[media]}; a sample is an image and text")
        if key := self._first(IMAGE_KEYS):
            self.images = [(values[key], str(names[key]))]
            if isinstance(values[key], list | tuple):
                several = enumerate(values[key])
                self.images = [(each, f"{names[key]}/{place}") for place, each in several if not _is_blank(each)]
            if len(self.images) > 1 and key not in ("image", "images"):
                raise RecordError("several images", f"{len(self.images)} of them in {names[key]}")
        conversations = self._conversations()
        if not (self.images or columns):
            unread = (key for key in self.filled if key not in TEXT_KEYS and _may_be_image(key, values[key]))
            if key := next(unread, None):
                raise RecordError("image column of an unknown name", f"{names[key]}: add ,image={names[key]}")
        return conversations

    def _first(self, keys: Iterable[str]) -> str | None:
        return next((key for key in keys if key in self.filled), None)

    def _refuse_unread(self, used: list[str], beside: str) -> None:
        """Refuse the record if a column like `beside` says something else than those that are used."""
        unread = [key for key in self.filled if key not in used and re.search(beside, key)]
        if unread := [key for key in unread if self.values[key] not in [self.values[each] for each in used]]:
            way_out = "name what is read with question= and answer=, or caption=, or conversations="
            raise RecordError("ambiguous columns", f"{', '.join(unread)} beside {', '.join(used)}: {way_out}")

    def _conversations(self) -> list[Found]:
        values = self.values
        said = self._first(CONVERSATION_KEYS) or next((key for key in CONVERSATION_KEYS[:2] if key in values), "")
        if (messages := values.get(said)) is not None:
            self._refuse_unread([said], BESIDE_ANSWER)
            are_pairs = isinstance(messages, list | tuple) and all(isinstance(pair, Mapping) for pair in messages)
            if are_pairs and messages and "user" in messages[0]:
                return self._rated_turns(messages)
        if self.layout.min_ratings:
            raise RecordError("no ratings", "min_rating is for records with texts and *_ratings")
        if messages is not None:
            return [self._conversation(messages)]
        if "prompt" in values and "completion" in values:
            both = {"user": values["prompt"], "assistant": values["completion"]}.items()
            parts = [[{"role": role, "content": part}] if isinstance(part, str) else part for role, part in both]
            if not all(isinstance(part, list | tuple) for part in parts):
                raise RecordError("prompt or completion is neither text nor a list")
            return [self._conversation([*parts[0], *parts[1]])]
        asked = [key for key in QUESTION_KEYS if key in self.filled]
        asked = asked[:2] if asked[:2] == ["instruction", "input"] else asked[:1]
        answer = self._first(ANSWER_KEYS)
        if not asked and "text" in self.filled and (answer or "question_id" in self.filled):
            asked = ["text"]
        if not asked and answer == "suffix":
            return self._captions("suffix")
        if asked or (answer and "question" in values):
            return [self._question(asked or ["question"], answer)]
        caption = self._first(CAPTION_KEYS) or next((key for key in CAPTION_KEYS if values.get(key) is not None), None)
        if caption is None:
            raise RecordError("no conversation, question or caption", _hint(self.record))
        self._refuse_unread([caption], BESIDE_CAPTION)
        return self._captions(caption)

    def _no_image(self, kind: str) -> RecordError:
        is_blank = any(isinstance(self.values.get(key), str) for key in IMAGE_KEYS)
        return RecordError("image name is empty" if is_blank else kind)

    def _rated_turns(self, pairs: Sequence[Mapping[str, Any]]) -> list[Found]:
        kept = [pair for place, pair in enumerate(pairs) if self._is_rated_well(place)]
        self.filtered = len(pairs) - len(kept)
        turns = [{"role": role, "content": pair.get(role)} for pair in kept for role in ("user", "assistant")]
        return [self._conversation(turns)] if kept else []

    def _is_rated_well(self, place: int) -> bool:
        for name, least in self.layout.min_ratings.items():
            for each in RATINGS if name == "rating" else (name,):
                ratings = self.record.get(f"{each}_ratings")
                if not isinstance(ratings, list | tuple) or len(ratings) <= place:
                    raise RecordError("no ratings", f"column {each}_ratings")
                if ratings[place] is None or ratings[place] < least:
                    return False
        return True

    def _conversation(self, messages: Any, is_question: bool = False) -> Conversation:
        if not isinstance(messages, list | tuple) or not messages:
            raise RecordError("conversation is not a list of turns" if messages else "conversation is empty")
        turns: list[Turn] = []
        image_turns: list[int] = []  # for each <image>, the turn that it is in
        if isinstance(system := self.values.get("system"), str) and system.strip():
            messages = [{"role": "system", "content": system}, *messages]
        for message in messages:
            if not isinstance(message, Mapping):
                raise RecordError("turn is not an object", f"{type(message).__name__} {str(message)[:40]!r}")
            speaker = message.get("from", message.get("role"))
            if not isinstance(speaker, str) or speaker.lower() not in ROLES:
                raise RecordError("unknown speaker", repr(speaker))
            role = ROLES[speaker.lower()]
            text, images = self._text(message.get("value", message.get("content")), role)
            if role == "system" and not str(text or "").strip():
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
            if role == "user" and (found := OTHER_TAGS.search(text)):
                raise RecordError(f"{found[0]} in a question", "a sample is an image and text")
            transcript = clean_text(transcript, "transcript") if transcript is not None else None
            recording = self.find(speech, "speech", "speech") if speech is not None else None
            turns.append(Turn(role, text, transcript, recording))  # type: ignore[arg-type]
        first = next((index for index, turn in enumerate(turns) if turn.role == "user"), 0)
        asked, there = len(image_turns), len(self.images)
        if asked and not there:
            raise self._no_image(f"{IMAGE_TOKEN} without an image")
        if asked > 1 and there == 1:
            raise RecordError(f"several {IMAGE_TOKEN} for one image", f"{asked} of them")
        if asked and asked != there:
            raise RecordError(f"{IMAGE_TOKEN} not once for each image", f"{asked} of them, {there} images")
        if asked > 1 and not (set(image_turns) == {first} and self.images_lead):
            raise RecordError(f"several images, but an {IMAGE_TOKEN} after text", "put all before the first question")
        if is_question:
            return tuple(turns)
        if not any(turn.role == "assistant" for turn in turns):
            raise RecordError("no answer")
        if turns[-1].role == "user":
            turns.pop()
            self.repairs.append("last question has no answer, and was cut")
        if image_turns and image_turns[0] != first:
            self.repairs.append("image stood in a later turn, and was put first")
        elif self.images and not image_turns and "value" in messages[0]:
            self.repairs.append(f"image without {IMAGE_TOKEN} in the text was put first")
        return tuple(turns)

    def _text(self, content: Any, role: str) -> tuple[Any, int]:
        """The text of a turn without <image>, and how many of these (or of image items) there were."""
        images = 0
        if isinstance(content, list | tuple):
            texts: list[Any] = []
            for item in content:
                kind = item.get("type") if isinstance(item, Mapping) else None
                if kind in ("image", "image_url", "input_image"):
                    images += 1
                    self.images_lead &= not texts
                    self._take_image(item)
                elif kind in ("text", "input_text"):
                    texts.append(item.get("text"))
                else:
                    raise RecordError("content is not text or image", f"{str(item)[:40]!r}")
            if not all(isinstance(text, str) for text in texts):
                raise RecordError("content text is not text")
            content = "\n".join(text.strip() for text in texts if text.strip())
        if isinstance(content, str) and IMAGE_TOKEN in content:
            images += content.count(IMAGE_TOKEN)
            self.images_lead &= LEADING_IMAGES.fullmatch(content) is not None
            content = content.replace(IMAGE_TOKEN, "")
        return content, images

    def _take_image(self, item: Mapping[str, Any]) -> None:
        """The image that a content item names, if it names one."""
        key = next((key for key in ("image", "path", "url", "image_url") if not _is_blank(item.get(key))), None)
        if key is None:
            return
        value = item[key].get("url") if key == "image_url" and isinstance(item[key], Mapping) else item[key]
        before = [image for image, _ in self.images]
        if not before or (self.images[0][1].startswith("content/") and [value] != before):
            self.images.append((value, f"content/{key}/{len(before)}"))
        elif len(before) == 1 and isinstance(before[0], str) and [value] != before:
            raise RecordError("several images", f"{before[0][:80]} and {str(value)[:80]}")

    def _question(self, asked: list[str], answer: str | None) -> Conversation:
        """A question, with what precedes it, and its answer if there is one."""
        values = self.values
        self._refuse_unread([*asked, *([answer] if answer else [])], BESIDE_ANSWER if answer else BESIDE_QUESTION)
        history = values.get("history") or []
        pairs = history if isinstance(history, list | tuple) else [history]
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise RecordError("history is not a list of questions with answers")
        said = [text for pair in history for text in pair]
        said.append(values[asked[0]] if len(asked) == 1 else [{"type": "text", "text": values[key]} for key in asked])
        texts: list[str] = []
        if answer == "label" and (asked == ["text"] or not isinstance(values["label"], list | tuple)):
            texts = [_as_label(values["label"], values[asked[0]], asked[0])]
        elif answer is not None or isinstance(values.get("answers"), list | tuple):
            value = _parse_list(values[answer or "answers"]) if answer in (None, "answers") else values[answer]
            if answer in (None, "answers") and not (self.layout.columns or isinstance(value, list | tuple | dict)):
                raise RecordError("answers are not a list, or it is empty", "add question= and answer= to read a text")
            texts = _as_answers(value)
        said += [usual for usual, _ in Counter(texts).most_common(1)]
        messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
        *turns, last = self._conversation(messages, is_question=not texts)
        return (*turns, last._replace(references=tuple(texts)) if len(texts) > 1 else last)

    def _captions(self, key: str) -> list[Found]:
        captions = _parse_list(self.values[key])
        captions = captions if isinstance(captions, list | tuple) else [captions]
        if not captions:
            raise RecordError("no caption")
        if not self.images:
            raise self._no_image("caption without an image")
        conversations: list[Found] = []
        for caption in captions:
            try:
                text = clean_text(caption.get("raw") if isinstance(caption, Mapping) else caption, "caption")
                if IMAGE_TOKEN in text:
                    raise RecordError(f"{IMAGE_TOKEN} outside a question")
                conversations.append((Turn("assistant", text),))
            except RecordError as error:
                conversations.append(error)
        return conversations


def _is_blank(value: Any) -> bool:
    """None, NaN, an empty list, or a text of nothing but white space."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (list, dict, tuple)):  # `value in ([], {})` makes two objects, and the collector run
        return not value
    return value is None or (isinstance(value, float) and value != value)


def _parse_list(value: Any) -> Any:
    """The list that a text spells, as cells of csv files do; otherwise the value."""
    if isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
        if all(isinstance(each, str | int | float | dict) for each in found):
            return found
    return value


def _as_answers(value: Any) -> list[str]:
    """The accepted answers: of one, or of a list of them, each also as {"answer"} or {"text"}."""
    answers = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, Mapping):
            item = next((item[key] for key in ("answer", "text", "raw_answer", "value") if key in item), None)
        for answer in item if isinstance(item, list | tuple) else [item]:
            if isinstance(answer, bool):
                answer = "yes" if answer else "no"
            elif isinstance(answer, int | float) and answer == answer:  # not NaN
                answer = str(int(answer) if answer == answer // 1 else answer)
            answers.append(clean_text(answer, "answer"))
    if not answers:
        raise RecordError("answers are not a list, or it is empty")
    return answers


def _may_be_image(name: str, value: Any) -> bool:
    """By its value, or by its name if it is no number."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(value, Mapping):
        value = b"" if value.get("bytes") is not None else value.get("path") or ""
    if isinstance(value, str):
        return bool(IMAGE_FILE.match(value[:500]) or (value.strip() and IMAGE_LIKE.search(name)))
    return value is not None and not isinstance(value, int | float | list | tuple)


def _as_label(value: Any, question: Any, asked: str) -> str:
    word = str(value).strip().rstrip(".").lower()
    if word in ("yes", "no"):
        return word
    if word in ("1", "0", "1.0", "0.0", "true", "false") and ASKS_YES_OR_NO.search(str(question)):
        return "yes" if word in ("1", "1.0", "true") else "no"
    if asked == "text" or not isinstance(value, str) or word.isdigit():
        way_out = f"add ,question={asked},answer=label to learn it as it is"
        raise RecordError("label is not yes or no", f"{value!r}; {way_out}")
    return clean_text(value, "label")


def _hint(record: Mapping[Any, Any]) -> str:
    """The columns of a record of unknown layout, and the options that may read it."""
    image = next((name for name, value in record.items() if _may_be_image("", value)), None)
    no_text = re.compile(r"(?i)(^|_)(id|index|key|url|width|height|split|source)_*$")
    filled = (name for name, value in record.items() if name != image and not _is_blank(value))
    texts = [name for name in filled if not no_text.search(str(name))]
    asks = [name for name in texts if str(record[name]).strip().endswith("?") or str(name).lower().startswith("q")]
    question = next(iter(asks), texts[0] if len(texts) > 1 else None)
    other = next((name for name in texts if name != question), None)
    roles = {"image": image, "question": question, "caption" if question is None else "answer": other}
    options = ",".join(f"{role}={name}" for role, name in roles.items() if name is not None)
    names = ", ".join(map(str, record))[:200]
    return f"columns {names}; to read them, add for example ,{options or 'image=COLUMN'}"
