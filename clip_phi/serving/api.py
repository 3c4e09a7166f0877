"""The engine over HTTP, with OpenAI's chat completions API: POST /v1/chat/completions and GET /v1/models.

A request contains its images and recordings as data; nothing is fetched. GET /health is the engine's state, GET
/metrics are counters for Prometheus.
"""

import asyncio
import binascii
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from urllib.parse import unquote

from ..templates import render
from .chat_schema import AudioPart, ChatRequest, ImagePart, TextPart, parse_request
from .detokenizer import token_bytes
from .engine import Completion, Engine, EngineClosedError, PreparedImage, QueueFullError, TokenLogprob
from .grammar import GrammarError
from .server import ApiError, Bodies, Gate, ServerLimits

try:
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from pydantic import BaseModel
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.middleware.cors import CORSMiddleware
except ImportError as error:
    raise ImportError(f"the HTTP API needs FastAPI and uvicorn: pip install 'clip-phi[serve]' ({error})") from error

DATA_URI = re.compile(r"data:[\w/.+-]*(;[^;,]*)*?;base64,", re.IGNORECASE)
WITH_PLUS_AND_SLASH = bytes.maketrans(b"-_", b"+/")  # url-safe base64 to the usual one
POLL_SECONDS = 0.5  # between two checks whether the client of a whole completion is still connected
DECODERS = 4  # threads that decode images
STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 501, 503)  # of errors


@dataclass(frozen=True)
class ApiLimits(ServerLimits):
    max_images: int = 8
    max_tokens: int = 1024
    max_messages: int = 64


class ErrorBody(BaseModel):
    error: dict[Literal["message", "type", "param", "code"], str | None]


def create_app(
    engine: Engine, name: str, *, api_key: str | None = None, limits: ApiLimits = ApiLimits(),
    transcribe: Callable[[bytes], str] | None = None, hosts: Sequence[str] = (), origins: Sequence[str] = (),
    abstain_below: float | None = None,
) -> FastAPI:  # fmt: skip
    """The application that uvicorn runs; the engine stays open when it ends.

    Args:
        name: model name in requests.
        api_key: bearer token that every request under /v1 needs.
        transcribe: text of an audio file's bytes; raises ValueError for bytes that are none, ImportError if a package
            is missing. None: input_audio is refused.
        abstain_below: confidence below which an answer becomes ABSTENTION, unless the request gives its form.
        hosts: names of this server that a Host header may have, see Gate.
        origins: of web pages that may send requests (CORS), for example http://localhost:5173, or "*"."""
    statuses: Counter[int] = Counter()
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "clip-phi"}
    bodies = Bodies(limits)
    # Threads of their own: however many images and recordings there are, requests without one are answered.
    decoders = ThreadPoolExecutor(DECODERS, "clip-phi images")
    listener = ThreadPoolExecutor(1, "clip-phi speech")

    def check_model(model: str) -> dict[str, Any]:
        if model != name:
            raise ApiError(404, f"there is no model {model!r} here, only {name!r}", code="model_not_found")
        return about

    # Without its documentation page, which loads scripts from the web, and without redirects
    app = FastAPI(title="Clip-Phi", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, limits=limits, statuses=statuses, api_key=api_key, hosts=hosts)
    if origins:
        allowed: Any = {"allow_origins": origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **allowed, max_age=3600)
    errors: Any = {status: {"model": ErrorBody} for status in (*STATUSES, "default")}
    schema = {"$ref": "#/components/schemas/ChatRequest"}
    asked = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    async def read_part(part: TextPart | ImagePart | AudioPart, images: list[PreparedImage]) -> dict[str, str]:
        """An item of a message for the engine; an image is appended to `images`."""
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        in_thread = asyncio.get_running_loop().run_in_executor
        if isinstance(part, AudioPart):
            if transcribe is None:
                raise ImportError("this server has no speech recognition: start it with --speech_model")
            data = part.input_audio.data
            return {"type": "transcript", "text": await in_thread(listener, lambda: transcribe(_from_base64(data)))}
        if len(images) == limits.max_images:
            raise ValueError(f"more than {limits.max_images} images")
        images.append(await in_thread(decoders, _image, part.image_url.url, engine, limits.max_pixels))
        return {"type": "image"}

    async def read_request(request: Request) -> tuple[ChatRequest, list[dict[str, Any]], list[PreparedImage]]:
        """The request, with its messages and images for the engine."""
        if "json" not in request.headers.get("content-type", ""):
            raise ApiError(415, "the Content-Type of a request must be application/json", Connection="close")
        async with bodies.read(request.receive) as content:
            body = await run_in_threadpool(parse_request, content)
            del content
            check_model(body.model)
            check_limits(body, limits)
            engine.check_queue()  # before its images are decoded
            images: list[PreparedImage] = []
            messages: list[dict[str, Any]] = []
            for number, message in enumerate(body.messages):
                items: list[dict[str, str]] = []
                messages.append({"role": message.role.replace("developer", "system"), "content": items})
                for place, part in enumerate(message.content):
                    path = f"messages[{number}].content[{place}]"
                    path += {"image_url": ".image_url.url", "input_audio": ".input_audio.data"}.get(part.type, "")
                    if await request.is_disconnected():
                        raise ApiError(499, "the client has disconnected")
                    try:
                        if part.type != "text" and message.role != "user":
                            raise ValueError("only a user's message can have images and recordings")
                        items.append(await read_part(part, images))
                    except ValueError as error:
                        raise ApiError(400, f"{path}: {error}", param=path) from error
            return body, messages, images

    @app.post("/v1/chat/completions", responses=errors, openapi_extra=asked)
    async def chat_completions(request: Request) -> Response:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, str | None]]()

        def put(number: int, piece: str | None) -> None:  # in the engine's thread
            if piece is None or (body.stream and below is None):  # where it may abstain, its text waits for the end
                loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

        try:
            body, messages, images = await read_request(request)
            below = None if body.grammars() else abstain_below
            body.confidence = body.confidence or below is not None
            callbacks = [partial(put, number) for number in range(body.n)]
            completions = await run_in_threadpool(_submit, engine, body, messages, images, callbacks, limits)
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full", Retry_After=str(error.retry_after)) from error
        except EngineClosedError as error:
            raise ApiError(503, str(error)) from error
        except ImportError as error:
            raise ApiError(501, str(error), code="part_missing") from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        judged: Any = {"messages": engine.add_default_instructions(messages), "abstain_below": below}
        answer = _Answer(completions, body, name, engine.processor.tokenizer, partial(engine.confidence, **judged))
        if body.stream:
            return StreamingResponse(answer.events(pieces), media_type="text/event-stream")
        await _wait(completions, pieces, request)
        for completion in completions:
            if completion.error is not None:
                raise _engine_error(completion.error)
        return JSONResponse(await run_in_threadpool(answer.whole))

    @app.get("/v1/models", responses=errors)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{model:path}", responses=errors)
    async def model(model: str) -> dict[str, Any]:
        return check_model(model)

    @app.get("/health")
    async def health() -> Response:
        state: dict[str, Any] = {"status": "ok" if engine.alive else "closed", "model": name}
        state |= {"running": engine.num_running, "waiting": engine.num_waiting}
        return JSONResponse(state, status_code=200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        times = sorted(engine.first_token_seconds) or [0.0]
        quantiles = [(q, times[min(len(times) - 1, int(q * len(times)))]) for q in (0.5, 0.9, 0.99)]
        text = "".join(render("metrics.txt", engine=engine, statuses=sorted(statuses.items()), quantiles=quantiles))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.exception_handler(ApiError)
    @app.exception_handler(StarletteHTTPException)
    async def on_error(request: Request, error: Any) -> Response:
        if isinstance(error, StarletteHTTPException):
            error = ApiError(error.status_code, str(error.detail), **(error.headers or {}))
        return error.response

    parts = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    app.openapi()["components"]["schemas"] |= parts.pop("$defs") | {"ChatRequest": parts}  # FastAPI keeps the schema
    return app


def check_limits(body: ChatRequest, limits: ApiLimits) -> None:
    """Raises ApiError for what can be seen without decoding anything."""
    for is_wrong, reason, param in (
        (not body.messages or body.messages[-1].role != "user", "the last message must be a user's", "messages"),
        (len(body.messages) > limits.max_messages, f"more than {limits.max_messages} messages", "messages"),
        (0 in (body.max_tokens, body.max_completion_tokens), "must be at least 1", "max_tokens"),
        (len(body.stop) > 4, "at most 4 texts", "stop"),
        (not all(0 < len(each) <= 256 for each in body.stop), "each text has 1 to 256 characters", "stop"),
        (bool(body.top_logprobs) and not body.logprobs, "requires logprobs", "top_logprobs"),
        (len(body.grammars()) > 1, "give one form of the answer", "structured_outputs"),
    ):
        if is_wrong:
            raise ApiError(400, f"{param}: {reason}", param=param)


def _submit(
    engine: Engine, body: ChatRequest, messages: list, images: list, callbacks: list, limits: ApiLimits
) -> list[Completion]:
    """Put a request into the queue. Runs in a thread: tokenising takes time."""
    grammar = None
    for path, argument in body.grammars().items():
        try:
            grammar = engine.grammars.compile(**argument)
        except ValueError as error:
            raise ApiError(400, f"{path}: {error}", param=path) from error
    asked = body.max_completion_tokens or body.max_tokens
    max_tokens = None if asked is None else limits.max_tokens if asked < 0 else min(asked, limits.max_tokens)
    options: dict[str, Any] = {"seed": body.seed, "stop": body.stop, "grammar": grammar, "cut": True}
    options |= {"temperature": body.temperature or 0.0, "top_p": body.top_p or 1.0, "max_new_tokens": max_tokens}
    options["top_logprobs"] = (body.top_logprobs or 0) if body.logprobs or body.confidence else None
    return engine.submit_many(engine.add_default_instructions(messages), images, callbacks, **options)


def _image(url: str, engine: Engine, max_pixels: int) -> PreparedImage:
    if (found := DATA_URI.match(url[:256])) is None:
        raise ValueError("must be a data: URI, 'data:image/jpeg;base64,...': nothing is fetched from elsewhere")
    return engine.read_image(_from_base64(url[found.end() :]), max_pixels)


def _from_base64(text: str) -> bytes:
    """The bytes, with or without line breaks and padding, url-safe or not. In pieces: each holds Python's lock."""
    if "%" in text:
        text = unquote(text)
    pieces, rest = [], b""
    try:
        for start in range(0, len(text), 2**20):
            piece = text[start : start + 2**20].encode("ascii").translate(WITH_PLUS_AND_SLASH, b" \r\n\t")
            piece = (rest + piece).rstrip(b"=") if start + 2**20 >= len(text) else rest + piece
            whole = len(piece) // 4 * 4
            pieces.append(binascii.a2b_base64(piece[:whole], strict_mode=True))
            rest = piece[whole:]
        pieces.append(binascii.a2b_base64(rest + b"=" * (-len(rest) % 4), strict_mode=True))
    except ValueError as error:
        raise ValueError(f"not base64: {error}") from error
    return b"".join(pieces)


class _Answer:
    """The completions of one request in OpenAI's format, whole or as server-sent events."""

    def __init__(self, completions: list[Completion], body: ChatRequest, name: str, tokenizer: Any, judge: partial):
        """judge: Engine.confidence; with abstain_below no text is sent before it is known."""
        self.completions, self.body, self.tokenizer, self.judge = completions, body, tokenizer, judge
        self.common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self.num_sent = [0] * len(completions)  # log-probabilities

    def whole(self) -> dict[str, Any]:
        choices = []
        for number, done in enumerate(self.completions):
            more = self._confidence(done)
            message = {"role": "assistant", "content": done.text, "refusal": None}
            choices.append(self._choice(number, done.finish_reason, message=message, **more))
        return self.common | {"object": "chat.completion", "choices": choices} | self._usage()

    async def events(self, pieces: asyncio.Queue[tuple[int, str | None]]) -> AsyncIterator[str]:
        """When the client disconnects this generator is closed, and the request leaves the batch."""
        try:
            for number in range(len(self.completions)):
                yield self._event(self._choice(number, None, delta={"role": "assistant", "content": ""}))
            running, withheld = len(self.completions), self.judge.keywords["abstain_below"] is not None
            while running:
                number, piece = await pieces.get()
                done = self.completions[number]
                if piece is not None:
                    yield self._event(self._choice(number, None, delta={"content": piece}))
                elif done.error is not None:
                    yield f"data: {json.dumps(_engine_error(done.error).body)}\n\n"
                    return
                else:
                    running -= 1
                    more = await run_in_threadpool(self._confidence, done)
                    delta = {"content": done.text} if withheld else {}
                    yield self._event(self._choice(number, done.finish_reason, delta=delta, **more))
            if self.body.stream_options.include_usage:
                yield self._event(**self._usage())
            yield "data: [DONE]\n\n"
        finally:
            for completion in self.completions:
                completion.cancel()

    def _choice(self, number: int, finish_reason: str | None, **content: Any) -> dict[str, Any]:
        """A choice, with the log-probabilities that were not yet given."""
        logprobs = None
        if self.body.logprobs:
            new = self.completions[number].logprobs[self.num_sent[number] :]
            self.num_sent[number] += len(new)
            logprobs = {"content": [self._logprob(each) for each in new], "refusal": None}
        return {"index": number, "logprobs": logprobs, "finish_reason": finish_reason} | content

    def _confidence(self, done: Completion) -> dict[str, Any]:
        return {"confidence": self.judge(done)} if self.body.confidence else {}

    def _logprob(self, found: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token) | {"logprob": logprob} for token, logprob in found.top]
        return self._token(found.token) | {"logprob": found.logprob, "top_logprobs": top}

    def _token(self, token: int) -> dict[str, Any]:
        data = token_bytes(self.tokenizer, token)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data)}

    def _usage(self) -> dict[str, Any]:
        """OpenAI's usage, and timings, which OpenAI does not have."""
        first = self.completions[0]
        tokens = sum(completion.num_tokens for completion in self.completions)
        usage = {"prompt_tokens": first.num_prompt_tokens, "completion_tokens": tokens}
        timings = {"first_token_seconds": first.first_token_seconds, "tokens_per_second": first.tokens_per_second}
        return {"usage": usage | {"total_tokens": sum(usage.values())}, "timings": timings}

    def _event(self, *choices: dict[str, Any], **more: Any) -> str:
        chunk = self.common | {"object": "chat.completion.chunk", "choices": choices} | more
        return f"data: {json.dumps(chunk)}\n\n"


async def _wait(completions: list[Completion], pieces: asyncio.Queue[tuple[int, str | None]], request: Request) -> None:
    """Return when the completions have ended. Raises ApiError if the client disconnects before."""
    running = len(completions)
    try:
        while running:
            with suppress(TimeoutError):
                running -= (await asyncio.wait_for(pieces.get(), POLL_SECONDS))[1] is None
            if running and await request.is_disconnected():
                raise ApiError(499, "the client has disconnected")
    finally:
        for completion in completions:
            completion.cancel()


def _engine_error(error: BaseException) -> ApiError:
    message = " ".join(str(error).split()) or type(error).__name__
    return ApiError({EngineClosedError: 503, GrammarError: 400}.get(type(error), 500), message)
