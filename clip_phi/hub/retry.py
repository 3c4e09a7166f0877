"""Trying again where the network or a server fails for a while: the only place of the project that does."""

import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from ..data.report import plain

HUB = "the Hub"
# Seconds between tries. huggingface_hub itself tries again for uploads and cut downloads, and not for creating a
# repository, for commits and their lost answers, and for downloads that are answered with 5xx.
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LOAD_WAITS = (1.0, 2.0, 4.0)
TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)
FINAL = {
    401: "the Hub does not accept this token: run 'hf auth login', or set HF_TOKEN",
    403: "this token has no right to do that: use a token with write access",
    404: "no such repository or revision, or not for this token",
}
# The base of all errors of the HTTP library that huggingface_hub uses (httpx, later httpx2).
HTTPError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
http: Any = import_module(HTTPError.__module__.partition(".")[0])
Result = TypeVar("Result")
Find = Callable[[BaseException], BaseException | None]  # the error of the server or connection behind it, if any


def with_retries(what: str, action: Callable[[], Result], server: str = HUB) -> Result:
    """Run an action on a server, again after growing waits while its failure may pass; each wait is a line on stderr.

    what: names the action in messages, for example "the commit to alice/clip-phi". action: can run several times.
    Raises ValueError or OSError, in one line, if the failure is final or stays."""
    kinds = (HTTPError, ConnectionError, TimeoutError, EntryNotFoundError)
    return _retry(what, action, WAITS, lambda error: _find(error, kinds), explain=True, server=server)


def load_with_retries(load: Callable[..., Result], *names: Any, **options: Any) -> Result:
    """load(*names, **options), again after waits of up to 7 s in all while the Hub fails. Files stay in the cache.

    load: a from_pretrained or from_backbones. names: folders and Hub ids. Raises OSError if the Hub fails at each try.
    Every other error is that of load: without a network it is raised at once."""

    def find(error: BaseException) -> BaseException | None:
        cause = _find(error, HTTPError)
        return None if type(cause).__name__ == "ConnectError" else cause

    return _retry(f"loading {' and '.join(map(str, names))}", lambda: load(*names, **options), LOAD_WAITS, find, False)


def _retry(
    what: str, action: Callable[[], Result], waits: tuple[float, ...], find: Find, explain: bool, server: str = HUB
) -> Result:
    """explain: final failures too."""
    for wait in (*waits, None):
        try:
            return action()
        except (HTTPError, OSError, RuntimeError) as error:
            cause = find(error)
            response = getattr(cause, "response", None)
            status, headers = getattr(response, "status_code", None), getattr(response, "headers", {})
            is_final = status not in (None, *TRANSIENT)
            if cause is None or (is_final and not explain):
                raise
            reason = f"the connection failed ({' '.join(str(cause).split()) or type(cause).__name__})"
            if status is not None:
                reason = f"{server} answered {status} {headers.get('X-Error-Message', '')}".rstrip()
            if is_final:
                status = 404 if isinstance(cause, RepositoryNotFoundError) else status
                if server == HUB and (known := FINAL.get(status or 0)):
                    raise ValueError(f"{what}: {known} ({reason})") from error
                raise OSError(f"{what}: {reason}") from error
            if wait is None:
                tries = f"{len(waits) + 1} times: try again later; finished transfers are kept"
                raise OSError(f"{what}: {reason} {tries}") from error
            asked = headers.get("Retry-After", "")
            seconds = max(wait, min(60.0, float(asked)) if asked.replace(".", "", 1).isdigit() else 0.0)
            print(plain(f"{what}: {reason}; trying again in {seconds:g} s"), file=sys.stderr, flush=True)
            time.sleep(seconds)
    raise AssertionError("not reached")


def _find(error: BaseException | None, kinds: Any) -> BaseException | None:
    """The first error of these kinds in the chain; uploads wrap the HTTP error in a RuntimeError."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error
