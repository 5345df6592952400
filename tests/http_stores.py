"""Block stores over HTTP that tests make misbehave: what all of them have in common."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StoreHandler(BaseHTTPRequestHandler):
    """Connections are kept, nothing is logged; what is answered is the subclass's."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def part(self, body: bytes) -> bytes:
        """What the request's `Range` asks for of `body`; all of it where there is none."""
        wanted = self.headers.get("Range", f"bytes=0-{len(body) - 1}")
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        return body[first : last + 1]


@contextmanager
def answering(handler: type[StoreHandler]) -> Iterator[str]:
    """The URL of a server on the loopback, which ends with the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
