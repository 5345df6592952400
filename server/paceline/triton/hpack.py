"""HTTP/2 header blocks (RFC 7541), as far as a gRPC client of one method needs them.

Invariant: stateless in both directions. Paceline announces a dynamic table of size 0, so a peer
that keeps to the standard refers to the static table only; a Huffman-coded string reads as None,
a reference to the dynamic table raises HpackError.
"""

from __future__ import annotations

_STATIC = (
    *(":authority", ":method", ":method", ":path", ":path", ":scheme", ":scheme"),
    *(":status",) * 7,
    *("accept-charset", "accept-encoding", "accept-language", "accept-ranges", "accept"),
    *("access-control-allow-origin", "age", "allow", "authorization", "cache-control"),
    *("content-disposition", "content-encoding", "content-language", "content-length"),
    *("content-location", "content-range", "content-type", "cookie", "date", "etag", "expect"),
    *("expires", "from", "host", "if-match", "if-modified-since", "if-none-match", "if-range"),
    *("if-unmodified-since", "last-modified", "link", "location", "max-forwards"),
    *("proxy-authenticate", "proxy-authorization", "range", "referer", "refresh", "retry-after"),
    *("server", "set-cookie", "strict-transport-security", "transfer-encoding", "user-agent"),
    *("vary", "via", "www-authenticate"),
)
_STATUSES = ("200", "204", "206", "304", "400", "404", "500")
_FIRST_STATUS = 8
_LONGEST_INTEGER_BITS = 28

Header = tuple[str | None, str | None]


class HpackError(Exception):
    """A header block that cannot be read without state."""


def encode(headers: list[tuple[str, str]]) -> bytes:
    """Every header as a literal that no table remembers.

    >>> encode([("te", "trailers")])
    b'\\x00\\x02te\\x08trailers'
    """
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers)


def decode(block: bytes) -> list[Header]:
    """Names and values in order; None for what is Huffman-coded. Raises HpackError."""
    found: list[Header] = []
    at = 0
    try:
        while at < len(block):
            first = block[at]
            if first & 0x80:
                index, at = _integer(block, at, 7)
                found.append(_indexed(index))
            elif first & 0xE0 == 0x20:
                _, at = _integer(block, at, 5)
            else:
                # With (01......) or without (0000...., 0001....) indexing: there is no table.
                index, at = _integer(block, at, 6 if first & 0x40 else 4)
                name: str | None
                if index:
                    name = _indexed(index)[0]
                else:
                    name, at = _read_string(block, at)
                value, at = _read_string(block, at)
                found.append((name, value))
    except IndexError:
        raise HpackError("a header block is cut off") from None
    return found


def _indexed(index: int) -> Header:
    if not 0 < index <= len(_STATIC):
        raise HpackError(f"a header refers to entry {index} of a table of size 0")
    status = index - _FIRST_STATUS
    return _STATIC[index - 1], _STATUSES[status] if 0 <= status < len(_STATUSES) else ""


def _string(text: str) -> bytes:
    data = text.encode()
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


def _read_string(block: bytes, at: int) -> tuple[str | None, int]:
    coded = block[at] & 0x80
    size, at = _integer(block, at, 7)
    end = at + size
    if end > len(block):
        raise HpackError("a header block is cut off")
    return None if coded else block[at:end].decode("latin-1"), end


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
