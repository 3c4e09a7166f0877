"""Trying again where the network or the Hub fails for a while: the only place of the project that does."""

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

# Seconds between tries. huggingface_hub itself tries again for uploads and cut downloads, and not for creating a
# repository, for commits and their lost answers, and for downloads that are answered with 5xx.
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LOAD_WAITS = (1.0, 2.0, 4.0)
TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)
# The base of all errors of the HTTP library that huggingface_hub uses (httpx, later httpx2).
HTTPError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
Result = TypeVar("Result")


def print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def with_retries(what: str, action: Callable[[], Result], log: Callable[[str], Any] = print_to_stderr) -> Result:
    """Run an action on the Hub, again after growing waits while its failure may pass.

    Args:
        what: names the action in messages, for example "the commit to alice/clip-phi".
        action: can run several times.
        log: gets one line for each wait.

    Raises:
        ValueError, OSError: in one line, if the failure is final or stays.
    """
    kinds = (HTTPError, ConnectionError, TimeoutError, EntryNotFoundError)
    return _retry(what, action, WAITS, lambda error: _find(error, kinds), explain=True, log=log)


def load_with_retries(load: Callable[..., Result], *names: Any, **options: Any) -> Result:
    """load(*names, **options), again after waits of up to 7 s in all while the Hub fails. Files stay in the cache.

    Args:
        load: a from_pretrained or from_backbones.
        names: folders and Hub ids.
        options: of load.

    Raises:
        OSError: if the Hub fails at each try. Every other error is that of load: without a network it comes at once.
    """

    def find(error: BaseException) -> BaseException | None:
        cause = _find(error, HTTPError)
        return None if type(cause).__name__ == "ConnectError" else cause

    what = f"loading {' and '.join(map(str, names))}"
    return _retry(what, lambda: load(*names, **options), LOAD_WAITS, find, explain=False, log=print_to_stderr)


def _retry(
    what: str,
    action: Callable[[], Result],
    waits: tuple[float, ...],
    find: Callable[[BaseException], BaseException | None],
    explain: bool,
    log: Callable[[str], Any],
) -> Result:
    """find: the error of the Hub or the connection behind an error, if there is one. explain: final failures too."""
    for wait in (*waits, None):
        try:
            return action()
        except (HTTPError, OSError, RuntimeError) as error:
            cause = find(error)
            is_final = cause is not None and _status(cause) not in (None, *TRANSIENT)
            if cause is None or (is_final and not explain):
                raise
            if wait is None or is_final:
                raise _explain(what, cause, len(waits) + 1) from error
            asked = _header(cause, "Retry-After")
            seconds = max(wait, min(60.0, float(asked)) if asked.replace(".", "", 1).isdigit() else 0.0)
            log(f"{what}: {_reason(cause)}; trying again in {seconds:g} s")
            time.sleep(seconds)
    raise AssertionError("not reached")


def _find(error: BaseException | None, kinds: Any) -> BaseException | None:
    """The first error of these kinds in the chain; uploads wrap the HTTP error in a RuntimeError."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _header(error: BaseException, name: str) -> str:
    return getattr(getattr(error, "response", None), "headers", {}).get(name, "")


def _reason(error: BaseException) -> str:
    if status := _status(error):
        return f"the Hub answered {status}"
    message = str(error).strip().split("\n")[0]
    return f"the connection failed ({message or type(error).__name__})"


def _explain(what: str, error: BaseException, tries: int) -> OSError | ValueError:
    status = _status(error)
    message = _header(error, "X-Error-Message")
    message = f" ({message})" if message else ""
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return ValueError(f"{what}: the Hub does not accept this token{message}: run 'hf auth login', or set HF_TOKEN")
    if status == 403:
        return ValueError(f"{what}: this token has no right to do that{message}: use a token with write access")
    if status in (401, 404):
        return ValueError(f"{what}: no such repository or revision, or not for this token{message}")
    if status is not None and status not in TRANSIENT:
        return OSError(f"{what}: the Hub answered {status}{message}")
    return OSError(f"{what}: {_reason(error)}{message} {tries} times: try again later; finished transfers are kept")
