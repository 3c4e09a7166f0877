"""OpenAI's request for a chat completion, as clients really send it: the supported part, and names of wrong parts."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from .server import ApiError

# json values of one request, counted by , : [ { and so with those in texts. More would take long to parse.
MAX_VALUES = 100_000
# What a field of this name may be, besides null, false, [] and {}, without asking for anything: OpenAI's defaults and
# those of vLLM and others; true is equal to 1. A field that is neither there nor in ChatRequest is refused.
NOTHING = json.loads(Path(__file__).with_name("unused_fields.json").read_text(encoding="utf-8"))
NO_EFFECT = ("user", "safety_identifier", "prompt_cache_key")  # they say who asks, not what


def _asks_for_nothing(name: str, value: Any) -> bool:
    if value is None or value is False or value in ([], {}) or value in NOTHING.get(name, ()):
        return True
    return name in NO_EFFECT and isinstance(value, str)


class _Part(BaseModel):
    """Fields that ask for nothing are left out, whatever their names. Others that are unknown are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in data.items() if name in required or not _asks_for_nothing(name, value)}


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    url: str = Field(description="a data: URI, 'data:image/jpeg;base64,...'")
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description="has no effect")


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(lambda url: {"url": url} if isinstance(url, str) else url)]


class InputAudio(_Part):
    data: str = Field(description="an audio file in base64")
    format: str | None = Field(None, description="has no effect: the file is recognized by its content")


class AudioPart(_Part):
    type: Literal["input_audio"]
    input_audio: InputAudio


PARTS = ("text", "image_url", "input_audio")
Parts = list[Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Parts, BeforeValidator(_as_parts, json_schema_input_type=str | Parts)] = []
    name: str | None = Field(None, description="has no effect")


Integer = Annotated[int, BeforeValidator(lambda n: int(n) if isinstance(n, float) and n.is_integer() else n)]

AsList = BeforeValidator(lambda x: [x] if isinstance(x, str) else x, json_schema_input_type=str | list[str])


class StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool = Field(default=False, description="has no effect")


class ChatRequest(_Part):
    """The supported part of OpenAI's request. Others of its fields are accepted where they ask for nothing."""

    model: str
    messages: list[Message]
    max_tokens: Annotated[Integer, Field(ge=-1)] | None = Field(None, description="-1: as many as there is room for")
    max_completion_tokens: Annotated[Integer, Field(ge=-1)] | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="default 0: greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: Annotated[Integer, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], AsList] = Field([], description="at most 4")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[Integer, Field(ge=1, le=8)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    confidence: bool = Field(False, description="not OpenAI's: how sure the answer is, as 'confidence' of each choice")
    response_format: dict[str, Any] | None = Field(None, description="text, json_object, json_schema, regex or choice")
    structured_outputs: dict[str, Any] | None = Field(None, description="vLLM's: json, json_object, regex or choice")
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None

    def grammars(self) -> dict[str, dict[str, Any]]:
        """What the answer is to follow: paths in the request, each with the argument of Grammars.compile."""
        form = self.response_format or {}
        kind = str(form.get("type", "text"))
        asked = [(f"guided_{name}", name, getattr(self, f"guided_{name}")) for name in ("json", "regex", "choice")]
        outputs = self.structured_outputs or {}
        asked += [(f"structured_outputs.{name}", name, value) for name, value in outputs.items()]
        asked = [each for each in asked if not _asks_for_nothing(*each[1:])]
        asked += [(f"response_format.{kind}", kind, form.get(kind, True))] if kind != "text" else []
        found = {}
        for path, name, value in asked:
            if name == "json_schema":
                path, value = f"{path}.schema", value.get("schema") if isinstance(value, dict) else None
            if name not in ("json", "json_schema", "json_object", "regex", "choice"):
                raise ApiError(400, f"{path}: not supported by this server", param=path)
            argument = name if name in ("regex", "choice") else "schema"
            found[path] = {argument: {"type": "object"} if name == "json_object" else value}
        return found


def parse_request(body: bytes) -> ChatRequest:
    """Raises ApiError, which names the part that is wrong."""
    if sum(body.count(mark) for mark in (b",", b":", b"[", b"{")) > MAX_VALUES:
        raise ApiError(400, f"a request has at most {MAX_VALUES:,} json values here")
    try:
        data = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not json: {error}") from error
    try:
        request = ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _as_error(error.errors(include_url=False, include_context=False)[0]) from None
    for number, message in enumerate(request.messages):
        if not message.content and message.role != "assistant":
            raise ApiError(400, f"messages[{number}].content: required", param=f"messages[{number}].content")
    return request


def _as_error(first: Any) -> ApiError:
    """The first of pydantic's errors, with the path of the part as in JavaScript."""
    path, kind = "", first["type"]
    for before, place in zip((None, *first["loc"]), first["loc"], strict=False):
        if not (isinstance(before, int) and place in PARTS):  # the tag of a union
            path += f"[{place}]" if isinstance(place, int) else f".{place}"
    is_unknown, is_part = kind == "extra_forbidden", kind.startswith("union_tag")
    words = {"missing": "required", "extra_forbidden": "not supported by this server: leave it out"}
    words |= dict.fromkeys(("model_type", "model_attributes_type"), "must be an object")
    message = f"must be one of {', '.join(PARTS)}" if is_part else words.get(kind, first["msg"])
    path = path.removeprefix(".") + ".type" * is_part
    code = "unsupported_parameter" if is_unknown else None
    return ApiError(400, f"{path or 'the body'}: {message}", param=path or None, code=code)
