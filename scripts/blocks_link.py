#!/usr/bin/env python3
"""Serves a directory over HTTP with ranges, at a limited rate over all connections.

    .venv/bin/python scripts/blocks_link.py DIR MBPS    # prints its port

Part of scripts/bench_blocks.py: a store behind a link. The link is as busy as it is asked to be,
whoever asks: while an answer waits for its turn, or for a processor that runs something else, the
link's time is counted as used by it; while nobody asks, or nobody takes what was asked for, the
link's time passes unused, and no burst makes up for it.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHUNK_S = 0.002
MOST_CHUNK_BYTES = 1 << 20


class Link:
    """What passes it passes one after the other."""

    def __init__(self, bytes_per_s: float) -> None:
        self._free_at_s = 0.0
        self._lock = threading.Lock()
        self.set_rate(bytes_per_s)

    def set_rate(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self.chunk_bytes = min(int(bytes_per_s * CHUNK_S), MOST_CHUNK_BYTES)

    def pass_through(self, size: int, there_since_s: float) -> float:
        """Waits until bytes that have been there since then are through; when they were."""
        with self._lock:
            self._free_at_s = max(self._free_at_s, there_since_s) + size / self._rate
            due_s = self._free_at_s
        wait_s = due_s - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)
        return due_s


class LinkServer(ThreadingHTTPServer):
    """A directory behind a link; `link.set_rate` may be called while it serves."""

    request_queue_size = 128  # connections beyond it would come a second later
    daemon_threads = True

    def __init__(self, root: Path, bytes_per_s: float) -> None:
        self.link = link = Link(bytes_per_s)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                path = (root / self.path.lstrip("/")).resolve()
                if not path.is_relative_to(root) or not path.is_file():
                    self.send_error(404)
                    return
                size = path.stat().st_size
                wanted = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=")
                first, last = map(int, wanted.split("-"))
                last = min(last, size - 1)
                self.send_response(206 if "Range" in self.headers else 200)
                self.send_header("Content-Length", str(last - first + 1))
                self.end_headers()
                self.wfile.flush()
                with path.open("rb") as file:
                    self.send(file.fileno(), first, last + 1)

            def send(self, file: int, first: int, stop: int) -> None:
                there_since_s = time.perf_counter()
                taker = self.connection.fileno()
                room = select.poll()
                room.register(taker, select.POLLOUT)
                os.set_blocking(taker, False)
                while first < stop:
                    count = min(link.chunk_bytes, stop - first)
                    there_since_s = link.pass_through(count, there_since_s)
                    while count:
                        try:
                            sent = os.sendfile(taker, file, first, count)
                        except BlockingIOError:
                            room.poll()
                            there_since_s = time.perf_counter()
                            continue
                        first, count = first + sent, count - sent
                os.set_blocking(taker, True)

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever stops loading drops its connections."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    server = LinkServer(Path(sys.argv[1]).resolve(), float(sys.argv[2]) * 1e6)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
