"""Bytes of a remote pool: HTTP(S) range requests, or an S3-compatible store through botocore.

A store retries what may pass (no connection, timeouts, 408, 429, 5xx, short answers) with back-off
and then raises PoolError that names the URL; what will not pass (404, 403) fails at once. An answer
is never longer than what was asked for. Each thread that fetches has a store of its own.
"""

from __future__ import annotations

import http.client
import random
import ssl
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from .manifest import MAX_MANIFEST_BYTES, PoolError

T = TypeVar("T")

TIMEOUT_S = 10.0
ATTEMPTS = 5
FIRST_PAUSE_S = 0.1
"""Doubles from one attempt to the next: 1.5 s in all before a store is given up."""
_PIECE_BYTES = 1 << 20
"""What stays in a core's cache from its reception until it is written."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)


Write = Callable[[int, memoryview], None]
"""Takes bytes and their position, the first's being 0."""


class Store(Protocol):
    """One remote pool."""

    def read(self, key: str, offset: int, size_bytes: int) -> bytes:
        """Exactly these bytes of `key`. Raises PoolError."""

    def expect(self, key: str, offset: int, size_bytes: int) -> None:
        """What the `copy` after the next one is going to ask for."""

    def copy(self, key: str, offset: int, size_bytes: int, write: Write) -> None:
        """Hands these bytes over in pieces, each gone when `write` returns. Raises PoolError.

        After a failure that may pass they come again from the first on.
        """

    def all(self, key: str) -> bytes:
        """The whole of a small file. Raises PoolError."""

    def close(self) -> None:
        """Its connections."""


class _Passing(Exception):
    """A failure that may be over at the next attempt."""


def open_store(url: str, *, s3_endpoint: str = "") -> Store:
    """The store behind a pool's URL. Raises PoolError for one of another kind."""
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        return HttpStore(url)
    if scheme == "s3":
        return S3Store(url, s3_endpoint)
    raise PoolError(f"pool {url}: {scheme}:// is none of http://, https://, s3://")


def channel(url: str) -> str:
    """Loads from stores of equal channels share one link."""
    return f"store {urlsplit(url).netloc}"


class HttpStore:
    """Range requests over two connections that are kept.

    The next request goes out on one while the answer comes on the other: a store takes a while to
    answer, and the link would be idle meanwhile.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        parts = urlsplit(url)
        if not parts.hostname:
            raise PoolError(f"pool {url}: no host")
        self._path = parts.path.rstrip("/")
        self._piece = memoryview(bytearray(_PIECE_BYTES))
        self._connection, self._spare = (
            _connection(parts.scheme, parts.hostname, parts.port) for _ in range(2)
        )
        self._expected: tuple[str, str] | None = None
        self._asked: tuple[str, str] | None = None
        """The key and the range that the spare connection was asked for."""

    def read(self, key: str, offset: int, size_bytes: int) -> bytes:
        def take(answer: http.client.HTTPResponse) -> bytes:
            body = answer.read(size_bytes)
            if len(body) != size_bytes:
                raise _Passing(f"{len(body)} bytes instead of {size_bytes}")
            return body

        return self._range(key, offset, size_bytes, take)

    def expect(self, key: str, offset: int, size_bytes: int) -> None:
        self._expected = (key, _range(offset, size_bytes))

    def copy(self, key: str, offset: int, size_bytes: int, write: Write) -> None:
        def take(answer: http.client.HTTPResponse) -> None:
            position = 0
            while position < size_bytes:
                count = answer.readinto(self._piece[: size_bytes - position])
                if not count:
                    raise _Passing(f"{position} bytes instead of {size_bytes}")
                write(position, self._piece[:count])
                position += count

        self._range(key, offset, size_bytes, take)

    def all(self, key: str) -> bytes:
        return _persist(
            f"{self._url}/{key}",
            lambda: self._get(key, "", 0, lambda answer: answer.read(MAX_MANIFEST_BYTES)),
        )

    def close(self) -> None:
        self._connection.close()
        self._spare.close()

    def _ask_ahead(self, now: tuple[str, str]) -> None:
        expected, self._expected = self._expected, None
        if expected is None or expected == now:
            return
        if self._asked is not None:
            self._spare.close()  # nobody took its answer
        key, wanted = self._asked = expected
        try:
            self._spare.request("GET", self._target(key), headers={"Range": wanted})
        except (OSError, http.client.HTTPException):
            self._spare.close()
            self._asked = None

    def _target(self, key: str) -> str:
        return f"{self._path}/{quote(key)}"

    def _range(
        self, key: str, offset: int, size_bytes: int, take: Callable[[http.client.HTTPResponse], T]
    ) -> T:
        wanted = _range(offset, size_bytes)
        return _persist(f"{self._url}/{key}", lambda: self._get(key, wanted, offset, take))

    def _get(
        self,
        key: str,
        wanted: str,
        offset: int,
        take: Callable[[http.client.HTTPResponse], T],
    ) -> T:
        try:
            if self._asked == (key, wanted):
                self._asked = None
                self._connection, self._spare = self._spare, self._connection
            else:
                headers = {"Range": wanted} if wanted else {}
                self._connection.request("GET", self._target(key), headers=headers)
            self._ask_ahead((key, wanted))
            answer = self._connection.getresponse()
            if answer.status in (200, 206):
                # A server that ignores ranges sends everything: usable only from the start.
                if answer.status == 200 and offset:
                    raise PoolError("the store answers range requests with the whole file")
                taken = take(answer)
                if not answer.isclosed():
                    self._connection.close()  # the rest of it is not wanted
                return taken
            answer.read(MAX_MANIFEST_BYTES)
        except PoolError:
            self._connection.close()
            raise
        except (OSError, http.client.HTTPException, _Passing) as error:
            self._connection.close()
            raise _Passing(str(error) or type(error).__name__) from None
        what = f"HTTP {answer.status} {answer.reason}"
        if answer.status in _PASSING:
            raise _Passing(what)
        raise PoolError(what)


class S3Store:
    """`s3://bucket/prefix`; credentials and region come from the environment, as elsewhere."""

    def __init__(self, url: str, endpoint: str) -> None:
        try:
            import botocore.config
            import botocore.exceptions
            import botocore.session
        except ImportError:
            raise PoolError(f"pool {url}: needs botocore: pip install 'paceline[s3]'") from None
        parts = urlsplit(url)
        self._url, self._bucket = url, parts.netloc
        self._prefix = parts.path.strip("/")
        self._client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=endpoint or None,
            config=botocore.config.Config(
                connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"total_max_attempts": 1}
            ),
        )
        self._client_error: Any = botocore.exceptions.ClientError
        self._failures = (botocore.exceptions.BotoCoreError, OSError)

    def read(self, key: str, offset: int, size_bytes: int) -> bytes:
        wanted = {"Range": _range(offset, size_bytes)}
        return _persist(f"{self._url}/{key}", lambda: self._get(key, wanted, size_bytes))

    def expect(self, key: str, offset: int, size_bytes: int) -> None: ...

    def copy(self, key: str, offset: int, size_bytes: int, write: Write) -> None:
        write(0, memoryview(self.read(key, offset, size_bytes)))

    def all(self, key: str) -> bytes:
        return _persist(f"{self._url}/{key}", lambda: self._get(key, {}, None))

    def close(self) -> None:
        self._client.close()

    def _get(self, key: str, extra: dict[str, str], size_bytes: int | None) -> bytes:
        name = "/".join(part for part in (self._prefix, key) if part)
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=name, **extra)
            body: bytes = answer["Body"].read(size_bytes or MAX_MANIFEST_BYTES)
        except self._client_error as error:
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if status in _PASSING:
                raise _Passing(str(error)) from None
            raise PoolError(str(error)) from None
        except self._failures as error:
            raise _Passing(str(error)) from None
        if size_bytes is not None and len(body) != size_bytes:
            raise _Passing(f"{len(body)} bytes instead of {size_bytes}")
        return body


def _connection(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    if scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)


def _range(offset: int, size_bytes: int) -> str:
    return f"bytes={offset}-{offset + size_bytes - 1}"


def _persist(what: str, attempt: Callable[[], T]) -> T:
    pause_s = FIRST_PAUSE_S
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except PoolError as error:
            raise PoolError(f"{what}: {error}") from None
        except _Passing as error:
            if number == ATTEMPTS:
                raise PoolError(f"{what}: {error}, {ATTEMPTS} times in a row") from None
            # Many that failed together shall not come back together.
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s *= 2
    raise AssertionError("unreachable")
