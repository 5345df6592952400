"""An S3-compatible store through botocore, whose calls return when an answer's head is there.

So threads make the calls, some of them ahead of use, and the bodies are read one after the other
by who wants them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from .manifest import MAX_MANIFEST_BYTES, PoolError
from .store import (
    MOST_AHEAD,
    PASSING,
    PIECE_BYTES,
    TIMEOUT_S,
    Ahead,
    Pace,
    Part,
    Passing,
    Write,
    once,
    persist,
)


class S3Store:
    """`s3://bucket/prefix`; credentials and region come from the environment, as elsewhere."""

    def __init__(self, url: str, endpoint: str) -> None:
        try:
            import botocore.config
            import botocore.exceptions
            import botocore.session
            import urllib3.exceptions
        except ImportError:
            raise PoolError(f"pool {url}: needs botocore: pip install 'paceline[s3]'") from None
        parts = urlsplit(url)
        self._url, self._bucket = url, parts.netloc
        self._prefix = parts.path.strip("/")
        self._client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=endpoint or None,
            config=botocore.config.Config(
                connect_timeout=TIMEOUT_S,
                read_timeout=TIMEOUT_S,
                retries={"total_max_attempts": 1},
                max_pool_connections=MOST_AHEAD + 1,
            ),
        )
        self._client_error: Any = botocore.exceptions.ClientError
        self._failures = (
            botocore.exceptions.BotoCoreError,
            urllib3.exceptions.HTTPError,
            OSError,
        )
        self._stopped = threading.Event()
        self._piece = memoryview(bytearray(PIECE_BYTES))
        self._threads = ThreadPoolExecutor(MOST_AHEAD + 1, "blocks-s3")
        self._ahead: Ahead[Future[Any]] = Ahead(lambda unread_bytes, _: unread_bytes, _drop)

    def expect(self, parts: Iterable[Part]) -> None:
        self._ahead.expect(parts)

    def read(self, part: Part) -> memoryview:
        text = memoryview(bytearray(part.size_bytes))

        def write(position: int, piece: memoryview) -> None:
            text[position : position + len(piece)] = piece

        self.copy(part, write)
        return text

    def copy(self, part: Part, write: Write, patience_s: float | None = None) -> None:
        what = f"{self._url}/{part.key}"
        if patience_s is None:
            persist(what, lambda: self._copy(part, write), self._stopped)
        else:  # for the first bytes; later ones are botocore's affair
            once(what, lambda: self._copy(part, write, patience_s))

    def all(self, key: str) -> bytes:
        def attempt() -> bytes:
            with self._failures_told():
                answer = self._get(key)
                text = bytearray(min(answer["ContentLength"], MAX_MANIFEST_BYTES))
                with contextlib.closing(answer["Body"]) as body:
                    if self._fill(memoryview(text), body, Pace()) < len(text):
                        raise Passing(f"less than its {len(text)} bytes")
                return bytes(text)

        return persist(f"{self._url}/{key}", attempt, self._stopped)

    def stop(self) -> None:
        """Within `TIMEOUT_S`: what waits for the next bytes goes on waiting for those."""
        self._stopped.set()

    def close(self) -> None:
        self._ahead.close()
        self._threads.shutdown()
        self._client.close()

    def _copy(self, part: Part, write: Write, patience_s: float | None = None) -> None:
        with self._failures_told():
            asked = self._ahead.pop(part) or self._send(part)
            self._ahead.begin(part)
            self._ahead.ask(part.size_bytes, self._send)
            try:
                body, pace = asked.result(patience_s)["Body"], Pace()
            except TimeoutError:
                _drop(asked)
                raise Passing("timed out") from None
            with contextlib.closing(body):
                position = 0
                while position < part.size_bytes:
                    room = self._piece[: part.size_bytes - position]
                    piece = room[: self._fill(room, body, pace)]
                    if not piece:
                        raise Passing(f"{position} bytes instead of {part.size_bytes}")
                    write(position, piece)
                    position += len(piece)
                    self._ahead.ask(part.size_bytes - position, self._send)

    def _fill(self, room: memoryview, body: Any, pace: Pace) -> int:
        """How many bytes of the body came: as many as there is room for, or all that were left.

        botocore's own `read` would wait for them however they trickle; what it reads from does not.
        """
        raw, count = body._raw_stream, 0
        read = getattr(raw, "read1", raw.read)  # urllib3 1 has none
        while count < len(room):
            began_s = time.perf_counter()
            some = read(len(room) - count)
            pace.came(len(some), time.perf_counter() - began_s)
            if self._stopped.is_set():
                raise Passing("stopped")
            if not some:
                break
            room[count : count + len(some)] = some
            count += len(some)
        return count

    def _send(self, part: Part) -> Future[Any]:
        return self._threads.submit(self._get, part.key, Range=part.range)

    def _get(self, key: str, **extra: str) -> Any:
        name = "/".join(part for part in (self._prefix, key) if part)
        return self._client.get_object(Bucket=self._bucket, Key=name, **extra)

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        """Raises Passing or PoolError for what botocore raises."""
        try:
            yield
        except self._client_error as error:
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            raise (Passing if status in PASSING else PoolError)(str(error)) from None
        except self._failures as error:
            raise Passing(str(error)) from None


def _drop(asked: Future[Any]) -> None:
    """Nobody is going to take its answer."""

    def close(done: Future[Any]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result()["Body"].close()

    if not asked.cancel():
        asked.add_done_callback(close)
