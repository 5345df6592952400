#!/usr/bin/env python3
"""Serves a directory over HTTP with ranges, at a limited rate over all connections.

    .venv/bin/python scripts/blocks_link.py DIR MBPS    # prints its port

Part of scripts/bench_blocks.py: a store behind a link.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK_BYTES = 1 << 20
BURST_S = 0.002


class Link:
    """One token bucket for all."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        with self._lock:
            now_s = time.perf_counter()
            self._free_at_s = max(self._free_at_s, now_s - BURST_S) + size / self._rate
            wait_s = self._free_at_s - now_s
        if wait_s > 0:
            time.sleep(wait_s)


def main() -> None:
    root, link = Path(sys.argv[1]).resolve(), Link(float(sys.argv[2]) * 1e6)

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
                while first <= last:
                    count = min(CHUNK_BYTES, last + 1 - first)
                    link.take(count)
                    while count:
                        sent = os.sendfile(self.connection.fileno(), file.fileno(), first, count)
                        first, count = first + sent, count - sent

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
