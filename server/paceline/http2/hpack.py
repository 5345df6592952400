"""HTTP/2 header blocks (RFC 7541).

Writing is stateless: every header is a literal that no table remembers, so blocks can be prepared
once. Reading keeps the dynamic table of the peer's choice, up to the size that was announced.
Invariant: a `Decoder` either reads a whole block or raises; after an error it is of no use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from paceline.http2 import huffman

TABLE_BYTES = 4096
"""The dynamic table's size unless SETTINGS says otherwise."""
_ENTRY_BYTES = 32
_LONGEST_INTEGER_BITS = 28

Header = tuple[str, str]
"""Bytes as latin-1 text: what a header means is its reader's business."""

_STATUSES = ("200", "204", "206", "304", "400", "404", "500")
_STATIC: tuple[Header, ...] = (
    (":authority", ""),
    *((":method", "GET"), (":method", "POST"), (":path", "/"), (":path", "/index.html")),
    *((":scheme", "http"), (":scheme", "https")),
    *((":status", status) for status in _STATUSES),
    *(("accept-charset", ""), ("accept-encoding", "gzip, deflate")),
    *(
        (name, "")
        for name in (
            *("accept-language", "accept-ranges", "accept", "access-control-allow-origin", "age"),
            *("allow", "authorization", "cache-control", "content-disposition"),
            *("content-encoding", "content-language", "content-length", "content-location"),
            *("content-range", "content-type", "cookie", "date", "etag", "expect", "expires"),
            *("from", "host", "if-match", "if-modified-since", "if-none-match", "if-range"),
            *("if-unmodified-since", "last-modified", "link", "location", "max-forwards"),
            *("proxy-authenticate", "proxy-authorization", "range", "referer", "refresh"),
            *("retry-after", "server", "set-cookie", "strict-transport-security"),
            *("transfer-encoding", "user-agent", "vary", "via", "www-authenticate"),
        )
    ),
)

FORGET = b"\x20"
"""Before the first block: this writer uses a dynamic table of size 0, whatever the peer offers."""


class HpackError(Exception):
    """A header block that cannot be read."""


class TooLarge(HpackError):
    """A header list above the limit; the table is still right."""


def encode(headers: Iterable[Header]) -> bytes:
    """Every header as a literal that no table remembers.

    >>> encode([("te", "trailers")])
    b'\\x00\\x02te\\x08trailers'
    """
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers)


class Decoder:
    """Reads one connection's blocks. `table_bytes` is what SETTINGS announced."""

    def __init__(self, table_bytes: int = TABLE_BYTES, max_list_bytes: int = 1 << 16) -> None:
        self._limit_bytes = self._max_bytes = table_bytes
        self._max_list_bytes = max_list_bytes
        self._table: deque[Header] = deque()
        self._bytes = 0
        self.changes = 0
        """How often the table changed: equal blocks mean the same as long as it has not."""

    def decode(self, block: bytes) -> list[Header]:
        """Names and values in order. Raises HpackError, TooLarge."""
        found: list[Header] = []
        size_bytes = at = 0
        try:
            while at < len(block):
                first = block[at]
                if first & 0xE0 == 0x20:
                    if found:
                        raise HpackError("a table's size changes within a block")
                    wanted_bytes, at = _integer(block, at, 5)
                    self._resize(wanted_bytes)
                    continue
                header, at = self._header(block, at, first)
                size_bytes += len(header[0]) + len(header[1]) + _ENTRY_BYTES
                found.append(header)
                if size_bytes > self._max_list_bytes:
                    # Names of the table repeat for a byte each: nothing more is kept, but read on.
                    found = [header]
        except IndexError:
            raise HpackError("a header block is cut off") from None
        except huffman.HuffmanError as error:
            raise HpackError(str(error)) from None
        if size_bytes > self._max_list_bytes:
            raise TooLarge(f"headers of {size_bytes} bytes; the limit is {self._max_list_bytes}")
        return found

    def _header(self, block: bytes, at: int, first: int) -> tuple[Header, int]:
        if first & 0x80:
            index, at = _integer(block, at, 7)
            return self._entry(index), at
        remembered = first & 0x40
        index, at = _integer(block, at, 6 if remembered else 4)
        if index:
            name = self._entry(index)[0]
        else:
            name, at = _read_string(block, at)
        value, at = _read_string(block, at)
        if remembered:
            self._remember((name, value))
        return (name, value), at

    def _entry(self, index: int) -> Header:
        if 0 < index <= len(_STATIC):
            return _STATIC[index - 1]
        index -= len(_STATIC) + 1
        if not 0 <= index < len(self._table):
            raise HpackError("a header refers to an entry that no table has")
        return self._table[index]

    def _remember(self, header: Header) -> None:
        self.changes += 1
        self._table.appendleft(header)
        self._bytes += len(header[0]) + len(header[1]) + _ENTRY_BYTES
        self._evict()

    def _resize(self, wanted_bytes: int) -> None:
        if wanted_bytes > self._limit_bytes:
            raise HpackError(f"a table of {wanted_bytes} bytes; the limit is {self._limit_bytes}")
        if wanted_bytes != self._max_bytes:
            self.changes += 1
            self._max_bytes = wanted_bytes
            self._evict()

    def _evict(self) -> None:
        while self._bytes > self._max_bytes:
            name, value = self._table.pop()
            self._bytes -= len(name) + len(value) + _ENTRY_BYTES


def _string(text: str) -> bytes:
    data = text.encode("latin-1")
    size = len(data)
    if size < 0x7F:
        return bytes((size,)) + data
    size -= 0x7F
    encoded = bytearray((0x7F,))
    while size > 0x7F:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    encoded.append(size)
    return bytes(encoded) + data


def _read_string(block: bytes, at: int) -> tuple[str, int]:
    coded = block[at] & 0x80
    size, at = _integer(block, at, 7)
    end = at + size
    if end > len(block):
        raise HpackError("a header block is cut off")
    data = block[at:end]
    return (huffman.decode(data) if coded else data).decode("latin-1"), end


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    limit = (1 << bits) - 1
    value = block[at] & limit
    at += 1
    if value < limit:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > _LONGEST_INTEGER_BITS:
            raise HpackError("an integer in a header block is too long")
