"""Bytes of a remote pool: HTTP(S) range requests, or an S3-compatible store through botocore.

A store retries what may pass (no connection, timeouts, 408, 429, 5xx, short answers) with back-off
and then raises PoolError that names the URL; what will not pass (404, 403) fails at once. An answer
is never longer than what was asked for. Each thread that fetches has a store of its own.
"""

from __future__ import annotations

import fcntl
import http.client
import random
import ssl
import termios
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
MOST_AHEAD = 7
"""Requests that are out beside the one whose answer is being read."""
AHEAD_BYTES = 4 << 20
"""While less is on its way the next request goes out: what 200 MB/s bring in 20 ms.

What was received does not count: answers share the link, and large ones would end together.
"""
_PASSING = (408, 425, 429, 500, 502, 503, 504)


Write = Callable[[int, memoryview], None]
"""Takes bytes and their position, the first's being 0."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a key."""

    key: str
    offset: int
    size_bytes: int

    @property
    def range(self) -> str:
        """As HTTP spells it."""
        return f"bytes={self.offset}-{self.offset + self.size_bytes - 1}"


class Store(Protocol):
    """One remote pool."""

    def expect(self, parts: Iterable[Part]) -> None:
        """What is going to be asked for after the next `read` or `copy`, in this order.

        Looked through once that has been asked for itself, as far as it is of use.
        """

    def read(self, part: Part) -> memoryview:
        """Exactly these bytes. Raises PoolError."""

    def copy(self, part: Part, write: Write) -> None:
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
    """Range requests over connections that are kept.

    What is asked for next goes out on others while an answer comes on one: a store takes a while
    to answer, and the link would be idle meanwhile. Answers are read in the order of use, and wait
    in the kernel's buffers until then.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        parts = urlsplit(url)
        if not parts.hostname:
            raise PoolError(f"pool {url}: no host")
        self._path = parts.path.rstrip("/")
        self._piece = memoryview(bytearray(_PIECE_BYTES))
        self._connect = partial(_connection, parts.scheme, parts.hostname, parts.port)
        self._idle: list[http.client.HTTPConnection] = []
        self._asked: dict[Part, http.client.HTTPConnection] = {}
        """Parts that were asked for ahead, and where their answers come."""
        self._expected: Iterable[Part] = ()

    def expect(self, parts: Iterable[Part]) -> None:
        self._expected = parts

    def read(self, part: Part) -> memoryview:
        text = memoryview(bytearray(part.size_bytes))
        self._receive(part, lambda position: text[position : position + _PIECE_BYTES], _nothing)
        return text

    def copy(self, part: Part, write: Write) -> None:
        self._receive(part, lambda position: self._piece[: part.size_bytes - position], write)

    def _receive(self, part: Part, room: Callable[[int], memoryview], done: Write) -> None:
        """Its bytes in pieces, each where there is `room` for what begins at a position."""

        def take(answer: http.client.HTTPResponse, connection: http.client.HTTPConnection) -> None:
            position = 0
            while position < part.size_bytes:
                self._ask_ahead(part.size_bytes - position, connection)
                piece = room(position)
                count = answer.readinto(piece)
                if not count:
                    raise _Passing(f"{position} bytes instead of {part.size_bytes}")
                done(position, piece[:count])
                position += count

        _persist(f"{self._url}/{part.key}", lambda: self._get(part.key, part, take))

    def all(self, key: str) -> bytes:
        def take(answer: http.client.HTTPResponse, _: http.client.HTTPConnection) -> bytes:
            return answer.read(MAX_MANIFEST_BYTES)

        return _persist(f"{self._url}/{key}", lambda: self._get(key, None, take))

    def close(self) -> None:
        for connection in (*self._idle, *self._asked.values()):
            connection.close()

    def _get(
        self,
        key: str,
        part: Part | None,
        take: Callable[[http.client.HTTPResponse, http.client.HTTPConnection], T],
    ) -> T:
        asked = None if part is None else self._asked.pop(part, None)
        connection = asked or self._free()
        try:
            if asked is None:
                self._ask(connection, key, part)
            if part is not None:
                ahead = islice((later for later in self._expected if later != part), MOST_AHEAD)
                self._expected = tuple(ahead)
                self._ask_ahead(part.size_bytes, connection)
            answer = connection.getresponse()
            _check_status(answer, part)
            taken = take(answer, connection)
            if not answer.isclosed():
                connection.close()  # the rest of it is not wanted
            return taken
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise _Passing(str(error) or type(error).__name__) from None
        except BaseException:
            connection.close()
            raise
        finally:
            self._idle.append(connection)

    def _free(self) -> http.client.HTTPConnection:
        return self._idle.pop() if self._idle else self._connect()

    def _ask(self, connection: http.client.HTTPConnection, key: str, part: Part | None) -> None:
        headers = {} if part is None else {"Range": part.range}
        connection.request("GET", f"{self._path}/{quote(key)}", headers=headers)

    def _ask_ahead(self, unread_bytes: int, connection: http.client.HTTPConnection) -> None:
        """Asks for what is expected unless enough is on its way, of this answer and others."""
        for part in self._asked.keys() - set(self._expected):
            unwanted = self._asked.pop(part)
            unwanted.close()  # nobody is going to take its answer
            self._idle.append(unwanted)
        coming_bytes = _coming(unread_bytes, connection)
        coming_bytes += sum(_coming(part.size_bytes, each) for part, each in self._asked.items())
        for part in self._expected:
            if coming_bytes >= AHEAD_BYTES:
                return
            if part in self._asked:
                continue
            free = self._free()
            new = free.sock is None
            try:
                self._ask(free, part.key, part)
            except (OSError, http.client.HTTPException):
                free.close()
                self._idle.append(free)
                return
            self._asked[part] = free
            coming_bytes += part.size_bytes
            if new:
                return  # one at a time: to connect takes round trips, and bytes wait to be read


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

    def expect(self, parts: Iterable[Part]) -> None: ...

    def read(self, part: Part) -> memoryview:
        wanted = {"Range": part.range}
        return memoryview(
            _persist(
                f"{self._url}/{part.key}", lambda: self._get(part.key, wanted, part.size_bytes)
            )
        )

    def copy(self, part: Part, write: Write) -> None:
        write(0, self.read(part))

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


def _check_status(answer: http.client.HTTPResponse, part: Part | None) -> None:
    """Raises _Passing or PoolError if it has not the bytes that were asked for."""
    if answer.status in (200, 206):
        # A server that ignores ranges sends everything: usable only from the start.
        if answer.status == 200 and part is not None and part.offset:
            raise PoolError("the store answers range requests with the whole file")
        return
    what = f"HTTP {answer.status} {answer.reason}"
    raise _Passing(what) if answer.status in _PASSING else PoolError(what)


def _nothing(position: int, piece: memoryview) -> None:
    """For pieces that are where they belong."""


def _coming(unread_bytes: int, connection: http.client.HTTPConnection) -> int:
    """Of the unread bytes of an answer those that the kernel has not received yet."""
    if connection.sock is None:  # it ends with this answer, which has the socket now
        return unread_bytes
    received = array("i", [0])
    fcntl.ioctl(connection.sock, termios.FIONREAD, received)
    return max(0, unread_bytes - received[0])


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
