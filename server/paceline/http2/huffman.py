"""The Huffman code of header strings (RFC 7541, appendix B), reading only.

The code is canonical: lengths say everything. Reading goes byte by byte through a state machine
(a state is a node of the code's tree) whose transitions are worked out when first needed.
"""

from __future__ import annotations

_LENGTHS = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c"
    "060a0a0c0d06080b0a0a080b080606060505050606060606060607080f060c0a"
    "0d06070707070707070707070707070707070707070707070807080d130d0e06"
    "0f05060506050606060507070606060506070605050607070707070f0b0e0d1c"
    "1416141416161617161717171717181718181617181717171715161716171718"
    "1615141616171715171616181516171715151615171617171416161617161617"
    "1a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b"
    "14181415161515171616191918181a171a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a"
)
"""Bits of each byte's code."""
_END = 256
_END_BITS = 30
_LONGEST_PADDING_BITS = 7


class HuffmanError(Exception):
    """No string of this code."""


def decode(data: bytes) -> bytes:
    """The string. Raises HuffmanError.

    >>> decode(bytes.fromhex("f1e3c2e5f23a6ba0ab90f4ff"))
    b'www.example.com'
    """
    found: list[bytes] = []
    node = 0
    for byte in data:
        step = _steps.get(node << 8 | byte)
        if step is None:
            step = _steps[node << 8 | byte] = _step(node, byte)
        node, symbols = step
        found.append(symbols)
    if node not in _padded:
        raise HuffmanError("a string ends within a character")
    return b"".join(found)


def _tree() -> list[list[int]]:
    """Nodes as pairs of followers: a node's number, or ~symbol."""
    order = sorted((bits, symbol) for symbol, bits in enumerate([*_LENGTHS, _END_BITS]))
    nodes = [[0, 0]]
    code = 0
    before = order[0][0]
    for bits, symbol in order:
        code <<= bits - before
        before = bits
        node = 0
        for shift in range(bits - 1, 0, -1):
            branch = code >> shift & 1
            if not nodes[node][branch]:
                nodes.append([0, 0])
                nodes[node][branch] = len(nodes) - 1
            node = nodes[node][branch]
        nodes[node][code & 1] = ~symbol
        code += 1
    return nodes


def _step(node: int, byte: int) -> tuple[int, bytes]:
    symbols = bytearray()
    for shift in range(7, -1, -1):
        node = _nodes[node][byte >> shift & 1]
        if node < 0:
            if ~node == _END:
                raise HuffmanError("a string holds the end-of-string code")
            symbols.append(~node)
            node = 0
    return node, bytes(symbols)


def _ones() -> frozenset[int]:
    """Where a string may end: padding is less than a byte of the end-of-string code's ones."""
    nodes = [0]
    for _ in range(_LONGEST_PADDING_BITS):
        nodes.append(_nodes[nodes[-1]][1])
    return frozenset(nodes)


_nodes = _tree()
_padded = _ones()
_steps: dict[int, tuple[int, bytes]] = {}
