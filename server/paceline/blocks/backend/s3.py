"""An S3-compatible store through botocore, whose calls return when an answer's head is there.

So threads make the calls, some of them ahead of use, and the bodies are read one after the other
by who wants them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from .manifest import MAX_MANIFEST_BYTES, PoolError
from .store import MOST_AHEAD, PASSING, PIECE_BYTES, TIMEOUT_S, Ahead, Part, Passing, Write, persist


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
                connect_timeout=TIMEOUT_S,
                read_timeout=TIMEOUT_S,
                retries={"total_max_attempts": 1},
                max_pool_connections=MOST_AHEAD + 1,
            ),
        )
        self._client_error: Any = botocore.exceptions.ClientError
        self._failures = (botocore.exceptions.BotoCoreError, OSError)
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

    def copy(self, part: Part, write: Write) -> None:
        persist(f"{self._url}/{part.key}", lambda: self._copy(part, write))

    def all(self, key: str) -> bytes:
        def attempt() -> bytes:
            with self._failures_told():
                body: bytes = self._get(key)["Body"].read(MAX_MANIFEST_BYTES)
                return body

        return persist(f"{self._url}/{key}", attempt)

    def close(self) -> None:
        self._ahead.close()
        self._threads.shutdown()
        self._client.close()

    def _copy(self, part: Part, write: Write) -> None:
        with self._failures_told():
            asked = self._ahead.pop(part) or self._send(part)
            self._ahead.begin(part)
            self._ahead.ask(part.size_bytes, self._send)
            body = asked.result()["Body"]
            with contextlib.closing(body):
                position = 0
                while position < part.size_bytes:
                    piece = body.read(min(PIECE_BYTES, part.size_bytes - position))
                    if not piece:
                        raise Passing(f"{position} bytes instead of {part.size_bytes}")
                    write(position, memoryview(piece))
                    position += len(piece)
                    self._ahead.ask(part.size_bytes - position, self._send)

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
