"""Bytes of a remote pool: HTTP(S) range requests here, an S3-compatible store in `s3`.

What is asked for next goes out while an answer comes: a store takes a while to answer, and the
link would be idle meanwhile. Answers are read in the order of use, and wait in the kernel's buffers
until then.

A store retries what may pass (no connection, timeouts, answers that trickle, 408, 429, 5xx, short
answers) with back-off and then raises PoolError that names the URL, or leaves that to who has
others to fetch meanwhile (`Later`); what will not pass (404, 403) fails at once. An answer is never
longer than what was asked for. Each thread that fetches has a store of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import io
import random
import socket
import ssl
import termios
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from .manifest import MAX_MANIFEST_BYTES, PoolError
from .source import Later

T = TypeVar("T")
Asked = TypeVar("Asked")
"""A request that is out: where its answer comes."""

TIMEOUT_S = 10.0
"""For a connection, and for the next bytes of an answer."""
LEAST_BYTES_PER_S = 64 << 10
"""Of an answer, after `TIMEOUT_S`: one that comes more slowly is given up."""
SOON_S = 2.0
"""Instead of that, at the first attempt of an object that others need not wait for."""
ATTEMPTS = 5
FIRST_PAUSE_S = 0.1
"""Doubles from one attempt to the next: 1.5 s in all before a store is given up."""
PIECE_BYTES = 256 << 10
"""What stays in a core's cache from its reception until it is written.

The kernel keeps what is written at once in one piece of memory, as far as it finds one so large:
from 1 MiB on in memory that nothing has used for long, which a hypervisor has taken back. Its
first touch then took 4 to 8 times as long as the writing, measured.
"""
MOST_AHEAD = 7
"""Requests that are out beside the one whose answer is being read."""
AHEAD_BYTES = 4 << 20
"""While less is on its way the next request goes out: what 200 MB/s bring in 20 ms.

What was received does not count: answers share the link, and large ones would end together.
"""
PASSING = (408, 425, 429, 500, 502, 503, 504)


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

    def copy(self, part: Part, write: Write, patience_s: float | None = None) -> None:
        """Hands these bytes over in pieces, each gone when `write` returns. Raises PoolError.

        After a failure that may pass they come again from the first on. With `patience_s` there is
        one attempt, for which the next bytes have so long to come. Raises Later if it fails so.
        """

    def all(self, key: str) -> bytes:
        """The whole of a small file. Raises PoolError."""

    def stop(self) -> None:
        """Whoever waits for bytes is refused them, in another thread than this one."""

    def close(self) -> None:
        """Its connections."""


class Passing(Exception):
    """A failure that may be over at the next attempt."""


class Pace:
    """How fast an answer comes; what is done with its bytes meanwhile does not count."""

    def __init__(self) -> None:
        self._waited_s = 0.0
        self._received_bytes = 0

    def came(self, size_bytes: int, waited_s: float) -> None:
        """So many bytes came after that time. Raises Passing if the answer is too slow."""
        self._waited_s += waited_s
        self._received_bytes += size_bytes
        if self._waited_s > TIMEOUT_S + self._received_bytes / LEAST_BYTES_PER_S:
            raise Passing(
                f"{self._received_bytes} bytes in {self._waited_s:.1f} s: "
                f"slower than {LEAST_BYTES_PER_S} bytes/s"
            )


class Ahead(Generic[Asked]):
    """Requests that are out before their bytes are wanted, in the order in which they will be."""

    def __init__(self, coming: Callable[[int, Asked], int], drop: Callable[[Asked], None]) -> None:
        """`coming`: of so many unread bytes those still to come; `drop`: nobody takes them."""
        self._coming = coming
        self._drop = drop
        self._expected: Iterable[Part] = ()
        self._asked: dict[Part, Asked] = {}

    def expect(self, parts: Iterable[Part]) -> None:
        self._expected = parts

    def pop(self, part: Part) -> Asked | None:
        """The request for it that is out, if there is one."""
        return self._asked.pop(part, None)

    def begin(self, part: Part) -> None:
        """This one has been asked for: now there is time to look at what follows."""
        ahead = islice((later for later in self._expected if later != part), MOST_AHEAD)
        self._expected = tuple(ahead)

    def ask(self, coming_bytes: int, send: Callable[[Part], Asked | None]) -> None:
        """Asks for what is expected until enough is on its way, or `send` does not go on.

        `coming_bytes`: of the answer that is being read.
        """
        for part in self._asked.keys() - set(self._expected):
            self._drop(self._asked.pop(part))
        coming_bytes += sum(
            self._coming(part.size_bytes, each) for part, each in self._asked.items()
        )
        for part in self._expected:
            if coming_bytes >= AHEAD_BYTES:
                return
            if part in self._asked:
                continue
            sent = send(part)
            if sent is None:
                return
            self._asked[part] = sent
            coming_bytes += part.size_bytes

    def close(self) -> None:
        while self._asked:
            self._drop(self._asked.popitem()[1])


def open_store(url: str, *, s3_endpoint: str = "") -> Store:
    """The store behind a pool's URL. Raises PoolError for one of another kind."""
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        return HttpStore(url)
    if scheme == "s3":
        from .s3 import S3Store  # what it needs may not be there, and takes a while to import

        return S3Store(url, s3_endpoint)
    raise PoolError(f"pool {url}: {scheme}:// is none of http://, https://, s3://")


def channel(url: str) -> str:
    """Loads from stores of equal channels share one link."""
    return f"store {urlsplit(url).netloc}"


class HttpStore:
    """Range requests over connections that are kept; what is ahead has connections of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        parts = urlsplit(url)
        if not parts.hostname:
            raise PoolError(f"pool {url}: no host")
        self._path = parts.path.rstrip("/")
        self._piece = memoryview(bytearray(PIECE_BYTES))
        self._connect = partial(_connection, parts.scheme, parts.hostname, parts.port)
        self._idle: list[http.client.HTTPConnection] = []
        self._ahead: Ahead[http.client.HTTPConnection] = Ahead(_coming, self._give_up)
        self._opened = False
        self._stopped = threading.Event()
        self._reading: socket.socket | None = None

    def expect(self, parts: Iterable[Part]) -> None:
        self._ahead.expect(parts)

    def read(self, part: Part) -> memoryview:
        text = memoryview(bytearray(part.size_bytes))
        self._receive(part, lambda position: text[position : position + PIECE_BYTES], _nothing)
        return text

    def copy(self, part: Part, write: Write, patience_s: float | None = None) -> None:
        def room(position: int) -> memoryview:
            return self._piece[: part.size_bytes - position]

        self._receive(part, room, write, patience_s)

    def _receive(
        self,
        part: Part,
        room: Callable[[int], memoryview],
        done: Write,
        patience_s: float | None = None,
    ) -> None:
        """Its bytes in pieces, each where there is `room` for what begins at a position."""

        def take(answer: http.client.HTTPResponse, connection: http.client.HTTPConnection) -> None:
            position = 0
            while position < part.size_bytes:
                self._ask_ahead(part.size_bytes - position, connection)
                piece = room(position)
                count = answer.readinto(piece)
                if not count:
                    raise Passing(f"{position} bytes instead of {part.size_bytes}")
                done(position, piece[:count])
                position += count

        what = f"{self._url}/{part.key}"
        if patience_s is None:
            persist(what, lambda: self._get(part.key, part, take), self._stopped)
        else:
            once(what, lambda: self._get(part.key, part, take, patience_s))

    def all(self, key: str) -> bytes:
        def take(answer: http.client.HTTPResponse, _: http.client.HTTPConnection) -> bytes:
            return answer.read(MAX_MANIFEST_BYTES)

        return persist(f"{self._url}/{key}", lambda: self._get(key, None, take), self._stopped)

    def stop(self) -> None:
        self._stopped.set()
        reading = self._reading
        if reading is not None:
            with contextlib.suppress(OSError):  # it is over anyway
                reading.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._ahead.close()
        for connection in self._idle:
            connection.close()

    def _get(
        self,
        key: str,
        part: Part | None,
        take: Callable[[http.client.HTTPResponse, http.client.HTTPConnection], T],
        patience_s: float | None = None,
    ) -> T:
        asked = None if part is None else self._ahead.pop(part)
        connection = asked or self._free()
        connection.timeout = patience_s or TIMEOUT_S
        if connection.sock is not None:
            connection.sock.settimeout(connection.timeout)
        try:
            if asked is None:
                self._ask(connection, key, part)
            self._reading = connection.sock
            if self._stopped.is_set():
                raise Passing("stopped")
            if part is not None:
                self._ahead.begin(part)
                self._ask_ahead(part.size_bytes, connection)
            answer = connection.getresponse()
            _check_status(answer, part)
            taken = take(answer, connection)
            if not answer.isclosed():
                connection.close()  # the rest of it is not wanted
            return taken
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Passing(str(error) or type(error).__name__) from None
        except BaseException:
            connection.close()
            raise
        finally:
            self._reading = None
            self._idle.append(connection)

    def _free(self) -> http.client.HTTPConnection:
        return self._idle.pop() if self._idle else self._connect()

    def _ask(self, connection: http.client.HTTPConnection, key: str, part: Part | None) -> None:
        headers = {} if part is None else {"Range": part.range}
        connection.request("GET", f"{self._path}/{quote(key)}", headers=headers)

    def _ask_ahead(self, unread_bytes: int, connection: http.client.HTTPConnection) -> None:
        """Asks for what is expected unless enough is on its way, of this answer and others."""
        self._opened = False
        self._ahead.ask(_coming(unread_bytes, connection), self._send_ahead)

    def _send_ahead(self, part: Part) -> http.client.HTTPConnection | None:
        if self._opened:
            return None  # one at a time: to connect takes round trips, and bytes wait to be read
        free = self._free()
        self._opened = free.sock is None
        try:
            self._ask(free, part.key, part)
        except (OSError, http.client.HTTPException):
            self._give_up(free)
            return None
        return free

    def _give_up(self, connection: http.client.HTTPConnection) -> None:
        """Nobody is going to take its answer."""
        connection.close()
        self._idle.append(connection)


class _Paced(io.RawIOBase):
    """What comes through a socket, as long as it does not trickle."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._pace = Pace()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        began_s = time.perf_counter()
        count: int | None = self._raw.readinto(buffer)
        self._pace.came(count or 0, time.perf_counter() - began_s)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """One that is given up when it trickles, its head as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp = io.BufferedReader(_Paced(self.fp.detach()))


def _connection(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    if scheme == "https":
        context = ssl.create_default_context()
        made: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=TIMEOUT_S, context=context
        )
    else:
        made = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    made.response_class = _Answer
    return made


def _check_status(answer: http.client.HTTPResponse, part: Part | None) -> None:
    """Raises Passing or PoolError if it has not the bytes that were asked for."""
    if answer.status in (200, 206):
        # A server that ignores ranges sends everything: usable only from the start.
        if answer.status == 200 and part is not None and part.offset:
            raise PoolError("the store answers range requests with the whole file")
        return
    what = f"HTTP {answer.status} {answer.reason}"
    raise Passing(what) if answer.status in PASSING else PoolError(what)


def _nothing(position: int, piece: memoryview) -> None:
    """For pieces that are where they belong."""


def _coming(unread_bytes: int, connection: http.client.HTTPConnection) -> int:
    """Of the unread bytes of an answer those that the kernel has not received yet."""
    if connection.sock is None:  # it ends with this answer, which has the socket now
        return unread_bytes
    received = array("i", [0])
    fcntl.ioctl(connection.sock, termios.FIONREAD, received)
    return max(0, unread_bytes - received[0])


def once(what: str, attempt: Callable[[], T]) -> T:
    """Raises Later, or PoolError when there is no use in trying again."""
    try:
        return attempt()
    except PoolError as error:
        raise PoolError(f"{what}: {error}") from None
    except Passing as error:
        raise Later(f"{what}: {error}") from None


def persist(what: str, attempt: Callable[[], T], stopped: threading.Event) -> T:
    """Raises PoolError when there is no use in trying again."""
    pause_s = FIRST_PAUSE_S
    for number in range(1, ATTEMPTS + 1):
        try:
            return once(what, attempt)
        except Later as error:
            if number == ATTEMPTS:
                raise PoolError(f"{error}, {ATTEMPTS} times in a row") from None
            # Many that failed together shall not come back together.
            if stopped.wait(pause_s * random.uniform(0.5, 1.0)):
                raise PoolError(f"{what}: given up: the model is being unloaded") from None
            pause_s *= 2
    raise AssertionError("unreachable")
