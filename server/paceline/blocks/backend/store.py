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
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from .manifest import MAX_MANIFEST_BYTES, PoolError

TIMEOUT_S = 10.0
ATTEMPTS = 5
FIRST_PAUSE_S = 0.1
"""Doubles from one attempt to the next: 1.5 s in all before a store is given up."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)


class Store(Protocol):
    """One remote pool."""

    def read(self, key: str, offset: int, size_bytes: int) -> bytes:
        """Exactly these bytes of `key`. Raises PoolError."""

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
    """Range requests over one connection that is kept."""

    def __init__(self, url: str) -> None:
        self._url = url
        parts = urlsplit(url)
        if not parts.hostname:
            raise PoolError(f"pool {url}: no host")
        self._path = parts.path.rstrip("/")
        if parts.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=TIMEOUT_S, context=ssl.create_default_context()
            )
        else:
            self._connection = http.client.HTTPConnection(
                parts.hostname, parts.port, timeout=TIMEOUT_S
            )

    def read(self, key: str, offset: int, size_bytes: int) -> bytes:
        wanted = f"bytes={offset}-{offset + size_bytes - 1}"
        return _persist(
            f"{self._url}/{key}", lambda: self._get(key, {"Range": wanted}, size_bytes, offset)
        )

    def all(self, key: str) -> bytes:
        return _persist(f"{self._url}/{key}", lambda: self._get(key, {}, None, 0))

    def close(self) -> None:
        self._connection.close()

    def _get(self, key: str, headers: dict[str, str], size_bytes: int | None, offset: int) -> bytes:
        try:
            self._connection.request("GET", f"{self._path}/{quote(key)}", headers=headers)
            answer = self._connection.getresponse()
            most = MAX_MANIFEST_BYTES if size_bytes is None else size_bytes
            if answer.status in (200, 206):
                # A server that ignores ranges sends everything: usable only from the start.
                if answer.status == 200 and offset:
                    raise PoolError("the store answers range requests with the whole file")
                body = answer.read(most)
                if answer.status == 200 and size_bytes is not None:
                    self._connection.close()  # the rest of it is not wanted
                if size_bytes is not None and len(body) != size_bytes:
                    raise _Passing(f"{len(body)} bytes instead of {size_bytes}")
                return body
            answer.read(most)
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
        wanted = {"Range": f"bytes={offset}-{offset + size_bytes - 1}"}
        return _persist(f"{self._url}/{key}", lambda: self._get(key, wanted, size_bytes))

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


def _persist(what: str, attempt: Callable[[], bytes]) -> bytes:
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
