"""The engine over HTTP, with OpenAI's chat completions API: POST /v1/chat/completions and GET /v1/models.

A request contains its images and recordings as data; nothing is fetched. GET /health is the engine's state, GET
/metrics are counters for Prometheus.
"""

import asyncio
import base64
import hmac
import json
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image

from ..batching.images import load_image
from .engine import Completion, Engine, EngineClosedError, QueueFullError

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
POLL_SECONDS = 0.5  # between two checks whether the client of a whole completion is still connected


@dataclass(frozen=True)
class ApiLimits:
    max_body: int = 32 * 2**20  # bytes
    max_pixels: int = 25_000_000  # of one image
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
    detail: Literal["auto", "low", "high"] | None = Field(None, description="has no effect")


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(_Strict):
    data: str = Field(description="an audio file in base64")
    format: Literal["wav", "mp3", "flac", "ogg", "m4a", "webm"]


class AudioPart(_Strict):
    type: Literal["input_audio"]
    input_audio: InputAudio


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]]
    name: str | None = None
    refusal: None = None


class ChatRequest(_Strict):
    """The supported part of OpenAI's request. Other parameters are refused by name, unless at their default."""

    model: str
    messages: list[Message]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="default 0: greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(None, description="at most 4")
    stream: bool | None = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    user: str | None = None


class ApiError(Exception):
    """A response with another status than 200, in OpenAI's format."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        # the request may contain unpaired surrogates, which UTF-8 cannot encode
        message = message.encode("utf-8", "backslashreplace").decode()
        param = param and param.encode("utf-8", "backslashreplace").decode()
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        kind = "server_error" if status >= 500 else kind
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def create_app(
    engine: Engine,
    name: str,
    *,
    api_key: str | None = None,
    limits: ApiLimits = ApiLimits(),
    transcribe: Callable[[bytes], str] | None = None,
) -> FastAPI:
    """The application that uvicorn runs; the engine stays open when it ends.

    Args:
        name: model name in requests.
        api_key: bearer token that every request under /v1 needs.
        transcribe: text of an audio file's bytes; raises ValueError for bytes that are none, ImportError if a package
            is missing. None: input_audio is refused."""
    statuses: Counter[int] = Counter()
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "clip-phi"}

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise ApiError(401, "wrong or missing API key", code="invalid_api_key", WWW_Authenticate="Bearer")

    def check_model(model: str) -> None:
        if model != name:
            raise ApiError(404, f"there is no model {model!r} here, only {name!r}", code="model_not_found")

    # Without its documentation page, which loads scripts from the web, and without redirects
    app = FastAPI(title="Clip-Phi", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(_Counted, statuses=statuses, max_body=limits.max_body)
    key_needed = [Depends(check_key)]

    @app.post("/v1/chat/completions", dependencies=key_needed)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        check_model(body.model)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def callback(piece: str | None) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            completion = await run_in_threadpool(_submit, engine, body, limits, transcribe, callback)
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full", Retry_After=str(error.retry_after)) from error
        except EngineClosedError as error:
            raise ApiError(503, str(error)) from error
        except ImportError as error:
            raise ApiError(501, str(error), code="part_missing") from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            with_usage = (body.stream_options or {}).get("include_usage", False)
            events = _events(completion, common | {"object": "chat.completion.chunk"}, pieces, with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        await _wait(completion, pieces, request)
        if completion.error is not None:
            raise _engine_error(completion.error)
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        choices = _choices(completion.finish_reason, message=message)
        return JSONResponse(common | {"object": "chat.completion"} | choices | _usage(completion))

    @app.get("/v1/models", dependencies=key_needed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{model:path}", dependencies=key_needed)
    async def model(model: str) -> dict[str, Any]:
        check_model(model)
        return about

    @app.get("/health")
    async def health() -> Response:
        state = {"status": "ok" if engine.alive else "closed", "model": name}
        numbers = {"running": engine.num_running, "waiting": engine.num_waiting}
        return JSONResponse(state | numbers, status_code=200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(_metrics(engine, statuses), media_type="text/plain; version=0.0.4")

    @app.exception_handler(ApiError)
    @app.exception_handler(RequestValidationError)
    @app.exception_handler(StarletteHTTPException)
    async def on_error(request: Request, error: Any) -> Response:
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"][1:]))
            error = ApiError(400, f"{place}: {first['msg']}" if place else first["msg"], param=place or None)
        elif isinstance(error, StarletteHTTPException):
            error = ApiError(error.status_code, str(error.detail), **(error.headers or {}))
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    return app


def serve(app: FastAPI, host: str, port: int, log_level: str = "info") -> None:
    """Run until SIGINT or SIGTERM; running requests then have 10 seconds to end.

    Raises OSError if the port is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}; try another --port") from error
    config = uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=10)
    uvicorn.Server(config).run(sockets=[listener])


def _submit(engine: Engine, body: ChatRequest, limits: ApiLimits, transcribe: Any, callback: Any) -> Completion:
    """Decode a request and put it into the queue. Runs in a thread: decoding takes time."""
    engine.check_queue()  # before its images are decoded
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    max_tokens = body.max_completion_tokens or body.max_tokens
    for is_wrong, reason, param in (
        (not body.messages or body.messages[-1].role != "user", "the last message must be a user's", "messages"),
        (len(body.messages) > limits.max_messages, f"more than {limits.max_messages} messages", "messages"),
        (len(stop) > 4, "stop takes at most 4 texts", "stop"),
        (not all(0 < len(each) <= 256 for each in stop), "each text of stop has 1 to 256 characters", "stop"),
        ((max_tokens or 0) > limits.max_tokens, f"max_tokens is at most {limits.max_tokens} here", "max_tokens"),
    ):
        if is_wrong:
            raise ApiError(400, reason, param=param)
    messages: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    for number, message in enumerate(body.messages):
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            messages.append({"role": role, "content": message.content})
            continue
        content: list[dict[str, str]] = []
        for place, part in enumerate(message.content):
            try:
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                elif role != "user":
                    raise ValueError("only a user's message can have images and recordings")
                elif isinstance(part, ImagePart):
                    if len(images) == limits.max_images:
                        raise ValueError(f"more than {limits.max_images} images")
                    images.append(_image(part.image_url.url, limits))
                    content.append({"type": "image"})
                elif transcribe is None:
                    raise ImportError("this server has no speech recognition: start it with --speech_model")
                else:
                    content.append({"type": "transcript", "text": transcribe(_from_base64(part.input_audio.data))})
            except ValueError as error:
                raise ApiError(400, str(error), param=f"messages.{number}.content.{place}") from error
        messages.append({"role": role, "content": content})
    return engine.submit(
        engine.add_default_instructions(messages),
        images,
        max_new_tokens=max_tokens,
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=body.seed,
        stop=stop,
        callback=callback,
    )


def _image(url: str, limits: ApiLimits) -> Image.Image:
    found = DATA_URI.fullmatch(url)
    if found is None:
        raise ValueError(
            "an image must be a data: URI, 'data:image/jpeg;base64,...': nothing is fetched from elsewhere"
        )
    return load_image(_from_base64(found["data"]), limits.max_pixels)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"not base64: {error}") from error


def _choices(finish_reason: str | None, **content: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "logprobs": None, "finish_reason": finish_reason} | content]}


def _usage(done: Completion) -> dict[str, Any]:
    """OpenAI's usage, and timings, which OpenAI does not have."""
    usage = {"prompt_tokens": done.num_prompt_tokens, "completion_tokens": done.num_tokens}
    timings = {"first_token_seconds": done.first_token_seconds, "tokens_per_second": done.tokens_per_second}
    return {"usage": usage | {"total_tokens": sum(usage.values())}, "timings": timings}


async def _events(completion: Completion, common: Any, pieces: Any, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. When the client disconnects this generator is closed, and the request leaves the batch."""
    try:
        yield _event(common | _choices(None, delta={"role": "assistant", "content": ""}))
        while (piece := await pieces.get()) is not None:
            yield _event(common | _choices(None, delta={"content": piece}))
        if completion.error is not None:
            yield _event(_engine_error(completion.error).body)
            return
        yield _event(common | _choices(completion.finish_reason, delta={}))
        if with_usage:
            yield _event(common | {"choices": []} | _usage(completion))
        yield "data: [DONE]\n\n"
    finally:
        completion.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _wait(completion: Completion, pieces: asyncio.Queue[str | None], request: Request) -> None:
    """Return when the completion has ended. Raises ApiError if the client disconnects before."""
    try:
        while True:
            with suppress(TimeoutError):
                if await asyncio.wait_for(pieces.get(), POLL_SECONDS) is None:
                    return
            if await request.is_disconnected():
                raise ApiError(499, "the client has disconnected")
    finally:
        completion.cancel()


def _engine_error(error: BaseException) -> ApiError:
    message = " ".join(str(error).split()) or type(error).__name__
    return ApiError(503 if isinstance(error, EngineClosedError) else 500, message)


def _metrics(engine: Engine, statuses: Counter[int]) -> str:
    """Prometheus text format, version 0.0.4."""
    counts, lines = engine.counts, []
    codes = {f'{{status="{status}"}}': count for status, count in sorted(statuses.items())}
    ends = {f'{{finish="{end}"}}': counts[end] for end in ("stop", "length", "cancelled", "failed")}
    times = sorted(engine.first_token_seconds) or [0.0]
    quantiles = {f'{{quantile="{q}"}}': times[min(len(times) - 1, int(q * len(times)))] for q in (0.5, 0.9, 0.99)}
    for kind, name, about, values in (
        ("counter", "http_responses_total", "HTTP responses by status.", codes),
        ("counter", "requests_total", "Finished requests by reason.", ends),
        ("summary", "first_token_seconds", "Time to the first token, of the last 1000 requests.", quantiles),
        ("counter", "prompt_tokens_total", "Prompt tokens, images included.", counts["prompt_tokens"]),
        ("counter", "tokens_total", "Generated tokens.", counts["tokens"]),
        ("counter", "steps_total", "Forward passes of the decoder.", counts["steps"]),
        ("counter", "images_total", "Images in prompts.", counts["images"]),
        ("counter", "images_encoded_total", "Images without cached features.", counts["images_encoded"]),
        ("gauge", "running", "Requests in the batch.", engine.num_running),
        ("gauge", "waiting", "Requests in the queue.", engine.num_waiting),
        ("gauge", "image_cache_bytes", "Bytes of cached image features.", engine.images.num_bytes),
    ):
        lines += [f"# HELP clip_phi_{name} {about}", f"# TYPE clip_phi_{name} {kind}"]
        labelled = values.items() if isinstance(values, dict) else [("", values)]
        lines += [f"clip_phi_{name}{labels} {value}" for labels, value in labelled]
    return "\n".join(lines) + "\n"


class _Counted:
    """Middleware that counts responses by status and refuses bodies of more than max_body bytes."""

    def __init__(self, app: Any, statuses: Counter[int], max_body: int):
        self.app, self.statuses, self.max_body = app, statuses, max_body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
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

        await self.app(scope, counted_receive, counted_send)
