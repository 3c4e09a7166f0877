"""The engine over HTTP, in the shape of OpenAI's chat completions: POST /v1/chat/completions and GET /v1/models.

Nothing is fetched for a request: images and sounds come inside it, as data. GET /health says whether the engine lives,
GET /metrics counts for Prometheus.
"""

import asyncio
import base64
import binascii
import hmac
import io
import json
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image

from ..batching.images import FORMATS, load_image
from .engine import Answer, Busy, Closed, Engine

try:
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.exceptions import HTTPException as StarletteHTTPException
except ImportError as error:
    raise ImportError(f"the HTTP API needs FastAPI and uvicorn: pip install 'clip-phi[serve]' ({error})") from error

DATA_URI = re.compile(r"data:(?P<type>image/[\w.+-]+)?(;[\w=-]+)*;base64,(?P<data>.*)", re.DOTALL)
POLL_SECONDS = 0.5  # how often it is looked whether who waits for a whole answer is still there


@dataclass(frozen=True)
class ApiLimits:
    """max_body: bytes of a request. max_pixels: of an image, max_images: of a request. max_tokens: of an answer.
    max_messages: of a conversation."""

    max_body: int = 32 * 2**20
    max_pixels: int = 25_000_000
    max_images: int = 8
    max_tokens: int = 1024
    max_messages: int = 64


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str = Field(description="a data: URI, 'data:image/jpeg;base64,...'")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="makes no difference here")


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(_Strict):
    data: str = Field(description="a sound file in base64")
    format: Literal["wav", "mp3", "flac", "ogg", "m4a", "webm"]


class AudioPart(_Strict):
    type: Literal["input_audio"]
    input_audio: InputAudio


class SystemMessage(_Strict):
    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class AssistantMessage(_Strict):
    role: Literal["assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None


class UserMessage(_Strict):
    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class ResponseFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    """What OpenAI's API takes and this one can do. The rest is refused by name, unless it asks for nothing."""

    model: str
    messages: list[Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0, greedy, if it is not given")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(None, description="at most 4")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None


class ApiError(Exception):
    """An answer that is not 200, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        # what came in may hold halves of characters, which cannot be sent back
        message = message.encode("utf-8", "backslashreplace").decode()
        param = param and param.encode("utf-8", "backslashreplace").decode()
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        kind = "server_error" if status >= 500 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def create_app(
    engine: Engine,
    name: str,
    *,
    api_key: str | None = None,
    limits: ApiLimits = ApiLimits(),
    hear: Callable[[bytes], str] | None = None,
    close_engine: bool = True,
) -> FastAPI:
    """The application that uvicorn runs.

    name: of the model, as clients give it. api_key: what every request under /v1 must bring as its bearer token.
    hear: the words in a sound file; it raises ValueError for one that is none, ImportError if it lacks a package. None:
    sounds are refused. close_engine: close the engine when the application ends."""
    statuses: Counter[int] = Counter()
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if close_engine:
            await run_in_threadpool(engine.close)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise ApiError(401, "wrong or missing API key", code="invalid_api_key", WWW_Authenticate="Bearer")

    # Neither its page of documentation, which loads scripts from the web, nor its redirects
    app = FastAPI(title="Clip-Phi", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(_Counted, statuses=statuses, max_body=limits.max_body)
    key_needed = [Depends(check_key)]

    @app.post("/v1/chat/completions", dependencies=key_needed)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        if body.model != name:
            raise ApiError(404, f"there is no model {body.model!r} here, only {name!r}", code="model_not_found")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def deliver(piece: str | None) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            answer = await run_in_threadpool(_submit, engine, body, limits, hear, deliver)
        except Busy as error:
            raise ApiError(429, str(error), code="queue_full", Retry_After=str(error.retry_after)) from error
        except Closed as error:
            raise ApiError(503, str(error)) from error
        except ImportError as error:
            raise ApiError(501, str(error), code="part_missing") from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        reply = _Reply(name, answer)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(_events(reply, pieces, usage), media_type="text/event-stream")
        await _wait(answer, pieces, request)
        if answer.error is not None:
            raise _engine_error(answer.error)
        return JSONResponse(reply.whole())

    @app.get("/v1/models", dependencies=key_needed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, started)]}

    @app.get("/v1/models/{model:path}", dependencies=key_needed)
    async def model(model: str) -> dict[str, Any]:
        if model != name:
            raise ApiError(404, f"there is no model {model!r} here, only {name!r}", code="model_not_found")
        return _model(name, started)

    @app.get("/health")
    async def health() -> Response:
        state = {"status": "ok" if engine.alive else "closed", "model": name}
        numbers = {"running": engine.num_running, "waiting": engine.num_waiting}
        return JSONResponse(state | numbers, status_code=200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(_metrics(engine, statuses), media_type="text/plain; version=0.0.4")

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        message = f"{place}: {first['msg']}" if place else first["msg"]
        return await on_api_error(request, ApiError(400, message, param=place or None))

    @app.exception_handler(StarletteHTTPException)
    async def on_http(request: Request, error: StarletteHTTPException) -> Response:
        return await on_api_error(request, ApiError(error.status_code, str(error.detail), **(error.headers or {})))

    return app


def serve(app: FastAPI, host: str, port: int, log_level: str = "info") -> None:
    """Run until SIGINT or SIGTERM; then answers that are under way have 10 seconds.

    Raises OSError if the port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}; try another --port") from error
    config = uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=10)
    uvicorn.Server(config).run(sockets=[listener])


# ---------------------------------------------------------------------- what comes in


def _submit(
    engine: Engine,
    body: ChatRequest,
    limits: ApiLimits,
    hear: Callable[[bytes], str] | None,
    deliver: Callable[[str | None], None],
) -> Answer:
    """Open what the request brings, and put it into the queue. In a thread: decoding takes time."""
    engine.refuse_if_busy()  # before its images are opened
    if not body.messages or body.messages[-1].role != "user":
        raise ApiError(400, "the last message must be a user's", param="messages")
    if len(body.messages) > limits.max_messages:
        raise ApiError(400, f"more than {limits.max_messages} messages", param="messages")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > 4 or not all(0 < len(each) <= 256 for each in stop):
        raise ApiError(400, "stop takes at most 4 texts of 1 to 256 characters", param="stop")
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is not None and max_tokens > limits.max_tokens:
        raise ApiError(400, f"max_tokens is at most {limits.max_tokens} here", param="max_tokens")
    messages: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    for number, message in enumerate(body.messages):
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            messages.append({"role": role, "content": message.content})
            continue
        content: list[dict[str, str]] = []
        for place, part in enumerate(message.content):
            param = f"messages.{number}.content.{place}"
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
            elif isinstance(part, ImagePart):
                if len(images) == limits.max_images:
                    raise ApiError(400, f"more than {limits.max_images} images", param=param)
                images.append(_image(part.image_url.url, limits, param))
                content.append({"type": "image"})
            else:
                content.append({"type": "transcript", "text": _transcript(part.input_audio.data, hear, param)})
        messages.append({"role": role, "content": content})
    return engine.submit(
        engine.completed(messages),
        images,
        max_new_tokens=max_tokens,
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=body.seed,
        stop=stop,
        deliver=deliver,
    )


def _image(url: str, limits: ApiLimits, param: str) -> Image.Image:
    found = DATA_URI.fullmatch(url)
    if found is None:
        message = "an image comes as a data: URI, 'data:image/jpeg;base64,...': nothing is fetched from elsewhere"
        raise ApiError(400, message, param=param)
    data = _from_base64(found["data"], param)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            num_pixels = header.width * header.height
    except Exception:  # load_image says what is wrong
        num_pixels = 0
    if num_pixels > limits.max_pixels:
        raise ApiError(400, f"an image of {num_pixels:,} pixels: at most {limits.max_pixels:,} here", param=param)
    try:
        return load_image(data)
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from error


def _transcript(data: str, hear: Callable[[bytes], str] | None, param: str) -> str:
    if hear is None:
        raise ApiError(501, "this server hears nothing: start it with --speech_model", param=param, code="part_missing")
    try:
        return hear(_from_base64(data, param))
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from error


def _from_base64(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"not base64: {error}", param=param) from error


# ---------------------------------------------------------------------- what goes out


class _Reply:
    """OpenAI's objects for one answer."""

    def __init__(self, name: str, answer: Answer):
        self.answer = answer
        self.common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.answer.finish_reason}
        return {**self.common, "object": "chat.completion", "choices": [choice], **self.numbers()}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.common, "object": "chat.completion.chunk", "choices": [choice], **more}

    def numbers(self) -> dict[str, Any]:
        """usage, and timings, which are not OpenAI's."""
        answer = self.answer
        usage = {"prompt_tokens": answer.num_prompt_tokens, "completion_tokens": answer.num_tokens}
        speed = {
            "first_token_seconds": answer.first_token_seconds,
            "tokens_per_second": answer.tokens_per_second,
        }
        return {"usage": usage | {"total_tokens": sum(usage.values())}, "timings": speed}


async def _events(reply: _Reply, pieces: asyncio.Queue[str | None], with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. When the client goes away this is closed, which frees the place in the batch."""
    try:
        yield _event(reply.chunk({"role": "assistant", "content": ""}))
        while (piece := await pieces.get()) is not None:
            yield _event(reply.chunk({"content": piece}))
        if reply.answer.error is not None:
            yield _event(_engine_error(reply.answer.error).body)
            return
        yield _event(reply.chunk({}, reply.answer.finish_reason))
        if with_usage:
            yield _event({**reply.chunk({}), "choices": [], **reply.numbers()})
        yield "data: [DONE]\n\n"
    finally:
        reply.answer.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _wait(answer: Answer, pieces: asyncio.Queue[str | None], request: Request) -> None:
    """Until the answer is whole, or nobody waits for it any more."""
    try:
        while True:
            try:
                if await asyncio.wait_for(pieces.get(), POLL_SECONDS) is None:
                    return
            except TimeoutError:
                pass
            if await request.is_disconnected():
                raise ApiError(499, "the client went away")
    finally:
        answer.cancel()


def _engine_error(error: BaseException) -> ApiError:
    message = " ".join(str(error).split()) or type(error).__name__
    return ApiError(503 if isinstance(error, Closed) else 500, message)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "clip-phi"}


def _metrics(engine: Engine, statuses: Counter[int]) -> str:
    """In Prometheus' text format, version 0.0.4."""
    counts = engine.counts
    lines = []

    def add(name: str, kind: str, about: str, values: Mapping[str, float]) -> None:
        lines.extend([f"# HELP clip_phi_{name} {about}", f"# TYPE clip_phi_{name} {kind}"])
        lines.extend(f"clip_phi_{name}{labels} {value}" for labels, value in values.items())

    codes = {f'{{status="{status}"}}': count for status, count in sorted(statuses.items())}
    add("http_responses_total", "counter", "HTTP responses by status.", codes)
    ends = {f'{{finish="{end}"}}': counts[end] for end in ("stop", "length", "cancelled", "failed")}
    add("requests_total", "counter", "Requests that left the engine, by how they ended.", ends)
    for name, about in (
        ("prompt_tokens", "Tokens of prompts, images included."),
        ("tokens", "Tokens that were generated."),
        ("steps", "Forward passes of the decoder."),
        ("images", "Images in prompts."),
        ("images_encoded", "Images that went through the vision tower; the others were cached."),
    ):
        add(f"{name}_total", "counter", about, {"": counts[name]})
    add("running", "gauge", "Requests in the batch.", {"": engine.num_running})
    add("waiting", "gauge", "Requests in the queue.", {"": engine.num_waiting})
    add("image_cache_bytes", "gauge", "Bytes of cached image features.", {"": engine.images.num_bytes})
    times = sorted(engine.first_token_seconds) or [0.0]
    quantiles = {f'{{quantile="{q}"}}': times[min(len(times) - 1, int(q * len(times)))] for q in (0.5, 0.9, 0.99)}
    add("first_token_seconds", "summary", "Time to the first token, of the last 1000 requests.", quantiles)
    return "\n".join(lines) + "\n"


class _Counted:
    """Middleware: counts responses by status, and refuses bodies of more than max_body bytes."""

    def __init__(self, app: Any, statuses: Counter[int], max_body: int):
        self.app, self.statuses, self.max_body = app, statuses, max_body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0

        async def counted_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        async def counted_receive() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:
                raise HTTPException(413, f"a request has at most {self.max_body:,} bytes here", {"Connection": "close"})
            return message

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            received = self.max_body  # what reads the body is told so
        await self.app(scope, counted_receive, counted_send)
