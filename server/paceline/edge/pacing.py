"""Grants of upload, and what they allow when.

Invariant: by the time t after the first byte a grant has let through at most its rate times t, and
the burst; never more than its payload.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.core.errors import ErrorKind, RequestError

BURST_BYTES = 64 << 10


@dataclass(slots=True)
class Upload:
    """A grant being used: `bytes_per_s` until `starts_s`, when its batch starts; the answer is
    wanted by `deadline_s`.

    >>> upload = Upload("m", 1000.0, 200_000, starts_s=200.0, deadline_s=201.0)
    >>> upload.take(BURST_BYTES, now_s=10.0), upload.take(5_000, now_s=12.0)
    (0.0, 3.0)
    """

    model: str
    bytes_per_s: float
    payload_bytes: int
    starts_s: float
    deadline_s: float
    taken_bytes: int = 0
    began_s: float | None = None

    def take(self, size_bytes: int, now_s: float) -> float:
        """Let `size_bytes` more through: how long to wait before the next are read.

        Raises RequestError when that is more than was granted, or too late for the batch.
        """
        if self.began_s is None:
            self.began_s = now_s
        self.taken_bytes += size_bytes
        if self.taken_bytes > self.payload_bytes:
            raise RequestError(
                ErrorKind.INVALID, f"the grant is for {self.payload_bytes} bytes, more have come"
            )
        paid_s = (self.taken_bytes - BURST_BYTES) / self.bytes_per_s
        wait_s = max(0.0, self.began_s + paid_s - now_s)
        if now_s + wait_s > self.starts_s:
            late_s = now_s + wait_s - self.starts_s
            raise RequestError(
                ErrorKind.DEADLINE, f"the upload is {late_s * 1e3:.0f} ms late for its batch"
            )
        return wait_s
