"""Our door to huggingface_hub: one patient HTTP client below it, its errors as one line each, no token told.

huggingface_hub retries some requests, with waits of its own, and others not at all. Here every request goes
through `Client`, which retries what may pass (a cut connection, 429, 5xx) a bounded number of times, waits as
long as the server says, counts the bytes that are sent, and can be stopped. What it gives up on is a
HubError, which huggingface_hub passes on.
"""

from __future__ import annotations

import contextlib
import email.utils
import importlib
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qexport.errors import MachineError

LOGIN = "log in with: hf auth login, or set HF_TOKEN"
_AGAIN = "push again: what was sent stays, and the push goes on from there"
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_SECRETS = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{6,}|(?i:bearer)\s+\S+")
_RATE_LIMIT = re.compile(r'"\w+"\s*;\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)')  # the Hub's own `ratelimit` header


class HubError(MachineError):
    """The Hub refuses, is not there, or broke off; `status` is HTTP's, None without an answer."""

    def __init__(
        self, found: str, *, expected: str = "", remedy: str = "", status: int | None = None
    ) -> None:
        self.status = status
        super().__init__(found, expected=expected, remedy=remedy)


class StorageRefusedError(HubError):
    """The storage does not take a file, as when the link that it was to go to is no longer valid."""


class Stopped(Exception):  # noqa: N818 - no error: somebody stopped the push
    """What a sending thread ends with when the push is stopped."""


@dataclass(frozen=True)
class Patience:
    """How often and how long a request is tried, in seconds, and how many files are sent at a time."""

    attempts: int = 6
    first_wait: float = 1.0  # doubles with every attempt
    longest_wait: float = 30.0
    longest_asked: float = 900.0  # a server that asks for more than this is not waited for
    connect_timeout: float = 30.0
    answer_timeout: float = 300.0  # a storage may think long about the last part of a large file
    files_at_once: int = 4


class Scrubber:
    """Takes tokens out of texts."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, text: str) -> str:
        """`text` in one line, without this token and whatever else looks like one."""
        return " ".join(_SECRETS.sub("***", text.replace(self._token, "***")).split())


class _Counted:
    """A file or a slice of one, as it is sent: tells the bytes."""

    def __init__(self, inner: Any, sent: Callable[[int], None]) -> None:
        self._inner, self._sent = inner, sent

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._inner.read(size)
        self._sent(len(data))
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._inner.seek(offset, whence))

    def tell(self) -> int:
        return int(self._inner.tell())

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read(1 << 20):
            yield data


class Client:
    """huggingface_hub's HTTP client while a push runs; `stop` ends whatever is under way.

    `waiting` is told, from any thread, why a request is tried again.
    """

    def __init__(self, patience: Patience, scrub: Scrubber, waiting: Callable[[str], None]) -> None:
        self.patience, self.scrub = patience, scrub
        self._waiting, self._stopped, self._thread = waiting, threading.Event(), threading.local()

    @contextlib.contextmanager
    def installed(self) -> Iterator[Client]:
        """Within it, every request of huggingface_hub's client, in all threads, is a patient one."""
        from huggingface_hub import close_session, get_session
        from huggingface_hub.utils import logging
        from huggingface_hub.utils.tqdm import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        talk: Any = logging  # untyped
        session: Any = get_session()
        module = next(kind.__module__ for kind in type(session).__mro__ if kind.__name__ == "Client")
        self._http = importlib.import_module(module.partition(".")[0])  # httpx2, or httpx before 2.0
        timeout, verbosity, quiet = session.timeout, talk.get_verbosity(), are_progress_bars_disabled()
        self._request = session.request
        session.request = self._patient
        session.timeout = self._http.Timeout(
            self.patience.answer_timeout, connect=self.patience.connect_timeout, pool=None
        )
        talk.set_verbosity_error()  # its warnings are told here, and may name a URL with its signature
        if not quiet:
            disable_progress_bars()
        try:
            yield self
        finally:
            if not quiet:
                enable_progress_bars()
            talk.set_verbosity(verbosity)
            session.timeout = timeout
            del session.request
            if self._stopped.is_set():
                close_session()  # its connections are in the middle of something

    @contextlib.contextmanager
    def counting(self, sent: Callable[[int], None]) -> Iterator[None]:
        """Within it, `sent` is told the bytes of each piece of a file that this thread sends.

        A negative number takes back an attempt that failed.
        """
        self._thread.sent = sent
        try:
            yield
        finally:
            del self._thread.sent

    def stop(self) -> None:
        """No more requests are begun; what sends a file learns of it by `wait(0)`."""
        self._stopped.set()

    def wait(self, seconds: float) -> None:
        """Sleeps, unless the push is stopped; then raises Stopped."""
        if self._stopped.wait(seconds):
            raise Stopped

    def _patient(self, method: str, url: Any, **kwargs: Any) -> Any:
        if method == "GET" and "authorization" not in (kwargs.get("headers") or {}):
            return self._request(method, url, **kwargs)  # huggingface_hub for itself, which can do without
        body = kwargs.pop("data", None)
        start = body.tell() if hasattr(body, "tell") else None
        sent = 0

        def count(size: int) -> None:
            nonlocal sent
            sent += size
            if size:
                getattr(self._thread, "sent", lambda size: None)(size)

        for attempt in range(1, self.patience.attempts + 1):
            self.wait(0)
            if start is not None:
                body.seek(start)
                kwargs["content"] = _Counted(body, count)
            elif body is not None:
                kwargs["data"] = body
            try:
                answer = self._request(method, url, **kwargs)
            except self._http.TransportError as error:
                if self._stopped.is_set():
                    raise Stopped from None
                if _is_commit(method, url) and not isinstance(error, self._http.ConnectError):
                    raise self._cut(url, error, 1) from None  # it may have been done
                if attempt == self.patience.attempts:
                    raise self._cut(url, error, attempt) from None
                why, pause = f"the connection broke off ({type(error).__name__})", self._pause(attempt)
            else:
                if not self._passes(answer, method, url):
                    return answer
                if attempt == self.patience.attempts:
                    raise self.refusal(answer)
                why, pause = f"the server answered {answer.status_code}", self._asked(answer, attempt)
            count(-sent)
            self._waiting(f"{why}: tried again in {pause:.3g} s ({attempt} of {self.patience.attempts})")
            self.wait(pause)
        raise AssertionError("the last attempt returns or raises")

    @staticmethod
    def _passes(answer: Any, method: str, url: Any) -> bool:
        """Whether the same request may do better later; a commit that met a 5xx may have been done."""
        if answer.status_code == 409:
            return "conflicting operation is in progress" in answer.text
        return answer.status_code in ({429} if _is_commit(method, url) else _PASSING)

    def _pause(self, attempt: int) -> float:
        return min(self.patience.first_wait * 2.0 ** (attempt - 1), self.patience.longest_wait)

    def _asked(self, answer: Any, attempt: int) -> float:
        """Seconds to wait: what the server says in its headers, else our own. Raises HubError if too long."""
        told = answer.headers.get("retry-after", "").strip()
        seconds: float | None = None
        if told.isdigit():
            seconds = float(told)
        elif told:
            with contextlib.suppress(ValueError):
                seconds = email.utils.parsedate_to_datetime(told).timestamp() - time.time()
        elif found := _RATE_LIMIT.search(answer.headers.get("ratelimit", "")):
            seconds = float(found[1])
        if seconds is None:
            return self._pause(attempt)
        if seconds > self.patience.longest_asked:
            raise HubError(
                f"{_host(answer.request.url)} takes no more requests for {seconds / 60:.0f} minutes "
                f"({answer.status_code})",
                remedy=f"then {_AGAIN}",
                status=answer.status_code,
            )
        return max(seconds, 0.0)

    def _cut(self, url: Any, error: Exception, attempts: int) -> HubError:
        reason = self.scrub(str(error)).rstrip(".") or type(error).__name__
        times = f" {attempts} times" if attempts > 1 else ""
        return HubError(f"the connection to {_host(url)} failed{times} ({reason})", remedy=_AGAIN)

    def refusal(self, answer: Any, repository: str = "the repository") -> HubError:
        """What an answer that is no success says to the user."""
        status, host = answer.status_code, _host(answer.request.url)
        message = self._message(answer)
        said = f"{status}: {message}" if message else str(status)
        found, expected, remedy = f"{host} answered {said}", "", ""
        if answer.request.method == "PUT" and status < 500 and status != 429:
            found = f"the storage at {host} refused a file ({said})"
            return StorageRefusedError(found, remedy=_AGAIN, status=status)
        if status == 401:
            found, expected = f"{host} does not accept the token ({said})", "a token that is valid"
            remedy = LOGIN
        elif status == 403:
            found = f"no right to write to {repository} ({said})"
            expected = "a token with write access to it"
            remedy = f"make one at https://{host}/settings/tokens, or name another repository; then {LOGIN}"
        elif status == 404:
            found = f"{host} has no {repository}, or the token may not see it ({said})"
            expected, remedy = "a repository id NAMESPACE/NAME", "look for a slip in it, and at who you are"
        elif status in (409, 412):
            found, remedy = f"{repository} was changed by someone else meanwhile ({said})", "push again"
        elif status == 429:
            found, remedy = f"{host} takes no more requests for now ({said})", f"later {_AGAIN}"
        elif status >= 500:
            found, remedy = f"{host} has trouble ({said})", f"later {_AGAIN}"
        return HubError(found, expected=expected, remedy=remedy, status=status)

    def _message(self, answer: Any) -> str:
        """What the server says for itself; a page or XML is none."""
        said = answer.headers.get("x-error-message", "")
        if not said:
            with contextlib.suppress(ValueError, AttributeError, RuntimeError):
                content = answer.json()
                said = content.get("error") or content.get("message") or ""
        return self.scrub(str(said))[:200].rstrip(" .")

    @contextlib.contextmanager
    def errors(self, repository: str) -> Iterator[None]:
        """Within it, whatever huggingface_hub raises becomes a HubError of one line without a token."""
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            yield
        except (HubError, Stopped):
            raise
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, (HubError, Stopped, HfHubHTTPError)):
                cause = cause.__cause__  # huggingface_hub wraps what a sending thread met
            if isinstance(cause, (HubError, Stopped)):
                raise cause from None
            if isinstance(cause, HfHubHTTPError):
                raise self.refusal(cause.response, repository) from None
            if isinstance(error, OfflineModeIsEnabled):
                raise HubError(
                    "huggingface_hub is offline (HF_HUB_OFFLINE)", remedy="unset HF_HUB_OFFLINE to push"
                ) from None
            if isinstance(error, (ValueError, RuntimeError, OSError, KeyError)) or (
                type(error).__module__.startswith(("hf_xet", "huggingface_hub"))
            ):
                reason = self.scrub(str(error))[:300].rstrip(".") or type(error).__name__
                raise HubError(f"the push to {repository} failed: {reason}") from None
            raise


def _is_commit(method: str, url: Any) -> bool:
    return method == "POST" and "/commit/" in urlsplit(str(url)).path


def _host(url: Any) -> str:
    return urlsplit(str(url)).netloc.rpartition("@")[2]
