"""What is checked before a request is answered: the key, the Host header, the size, and the time that a client takes.

For uvicorn, whose own limits begin when a request has been received."""

import asyncio
import functools
import gc
import hmac
import ipaddress
import os
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

try:
    import h11
    import uvicorn
    from starlette.datastructures import Headers
    from starlette.responses import JSONResponse, Response
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise ImportError(f"the HTTP API needs FastAPI and uvicorn: pip install 'clip-phi[serve]' ({error})") from error

SMALL_BODY = 2**20  # bytes; smaller bodies are read whatever else is in memory


@dataclass(frozen=True)
class ServerLimits:
    max_body: int = 32 * 2**20  # bytes of one request
    max_bodies: int = 256 * 2**20  # bytes of all requests that are not yet decoded
    header_seconds: float = 10  # until a request's headers are complete
    body_seconds: float = 60  # until its body is complete, and for a client that reads no further
    max_connections: int = 512
    max_pixels: int = 25_000_000  # of one image


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

    @property
    def response(self) -> Response:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


class Gate:
    """ASGI middleware: refuses a request before its body is read, and counts responses by status.

    Args:
        api_key: bearer token that every path under /v1 needs. None: no key, and then the Host header must be an
            address, a name without a dot or one of `hosts` ("*": any). A web page cannot use such a name to send
            requests to this server in its visitor's browser (DNS rebinding).
        same_origin: refuse what a page of another origin sends. Browsers let every page send forms to every server."""

    def __init__(
        self, app: Any, limits: ServerLimits, statuses: Counter[int] | None = None, api_key: str | None = None,
        hosts: Sequence[str] = (), same_origin: bool = False,
    ):  # fmt: skip
        self.app, self.limits, self.statuses = app, limits, Counter() if statuses is None else statuses
        self.api_key, self.hosts, self.same_origin = api_key, hosts, same_origin

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        scope = scope | {"method": "GET"} if scope.get("method") == "HEAD" else scope  # uvicorn sends the headers alone
        error = self._refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (self.app if error is None else error.response)(scope, receive, counted_send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        host, given, size = (headers.get(name, "") for name in ("host", "authorization", "content-length"))
        # the host that a browser asked a Hugging Face Space for
        hosts = (host, headers.get("x-forwarded-host")) if os.environ.get("SPACE_ID") else (host,)
        needs_key = self.api_key is not None and f"{path}/".startswith("/v1/")
        error = None
        if self.api_key is None and not ("*" in self.hosts or is_local_name(host, self.hosts)):
            error = ApiError(403, "the Host header is not a name of this server: start it with --allow_host or a key")
        elif self.same_origin and headers.get("origin", f"//{host}").partition("//")[2] not in hosts:
            error = ApiError(403, "this request comes from a page of another origin")
        elif needs_key and not hmac.compare_digest(given.encode(), f"Bearer {self.api_key}".encode()):
            error = ApiError(401, "wrong or missing API key", code="invalid_api_key", WWW_Authenticate="Bearer")
        elif size.isdecimal() and int(size) > self.limits.max_body:
            error = too_large(self.limits)
        if error is not None:
            error.headers["Connection"] = "close"  # the body is not read
        return error


def too_large(limits: ServerLimits) -> ApiError:
    return ApiError(413, f"a request has at most {limits.max_body:,} bytes here", Connection="close")


def is_local_name(host: str, allowed: Sequence[str] = ()) -> bool:
    """Whether a Host header names this server by an address, a name without a dot, or an allowed name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        plain = "." not in name.rstrip(".") and ":" not in name or name.endswith(".localhost")
        return plain or name in allowed or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class Bodies:
    """The bodies of requests that are not yet decoded, with a limit for each and for all together."""

    def __init__(self, limits: ServerLimits):
        self.limits, self.num_bytes = limits, 0

    @asynccontextmanager
    async def read(self, receive: Any) -> AsyncIterator[bytes]:
        """A body, which counts until the block ends. Raises ApiError if it is too large, too slow or not whole."""
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.limits.body_seconds) as timeout:
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client has disconnected")
                    chunks.append(message.get("body", b""))
                    more = message.get("more_body", False)
                    size += len(chunks[-1])
                    self.num_bytes += len(chunks[-1])
                    if size > self.limits.max_body:
                        raise too_large(self.limits)
                    if size > SMALL_BODY and self.num_bytes > self.limits.max_bodies:
                        raise ApiError(429, "too many large requests at once", code="queue_full", Retry_After="1")
            chunks = [b"".join(chunks)]
            yield chunks.pop()
        except TimeoutError:
            if not timeout.expired():
                raise
            seconds = f"{self.limits.body_seconds:g} s"
            raise ApiError(408, f"the body was not complete after {seconds}", Connection="close") from None
        finally:
            self.num_bytes -= size


class _Protocol(H11Protocol):
    """uvicorn's HTTP, with a time for the headers, a time for clients that do not read, and a limit of connections."""

    def __init__(self, *args: Any, limits: ServerLimits, **options: Any):
        super().__init__(*args, **options)
        self.limits = limits
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.is_refused = False

    def _set_timer(self, name: str, seconds: float | None) -> None:
        """End the connection after so many seconds; None: no longer."""
        if seconds is None:
            if (timer := self.timers.pop(name, None)) is not None:
                timer.cancel()
        elif name not in self.timers:
            self.timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._set_timer("headers", self.limits.header_seconds)
        if len(self.connections) > self.limits.max_connections:
            self.is_refused = True
            self.connections.discard(self)
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n")
            transport.write_eof()  # not close: with data that nobody has read, the client would get no answer

    def data_received(self, data: bytes) -> None:
        if self.is_refused:
            return
        super().data_received(data)
        # h11 is in this state until it has all headers of the next request
        self._set_timer("headers", self.limits.header_seconds if self.conn.their_state is h11.IDLE else None)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_timer("reading", self.limits.body_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_timer("reading", None)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for name in list(self.timers):
            self._set_timer(name, None)


def make_config(app: Any, limits: ServerLimits = ServerLimits(), log_level: str = "info") -> uvicorn.Config:
    """uvicorn's configuration with these limits. Running requests have 10 seconds to end after SIGINT or SIGTERM."""
    options: Any = {"http": functools.partial(_Protocol, limits=limits), "ws": "none", "log_level": log_level}
    return uvicorn.Config(app, **options, timeout_keep_alive=15, timeout_graceful_shutdown=10)


def serve(app: Any, host: str, port: int, log_level: str = "info", limits: ServerLimits = ServerLimits()) -> None:
    """Run until SIGINT or SIGTERM. Raises OSError if the port is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol's number asyncio sets TCP_NODELAY; else a response is held back for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}; try another --port") from error
    sys.setswitchinterval(0.001)  # else the event loop waits 5 ms for each thread that computes
    gc.collect()
    gc.freeze()  # else each full collection goes through the libraries' objects, and holds everything up for 0.3 s
    uvicorn.Server(make_config(app, limits, log_level)).run(sockets=[listener])
