"""Header blocks: the standard's own examples, and what no block may do."""

from __future__ import annotations

import pytest

from paceline.http2 import huffman
from paceline.http2.hpack import FORGET, Decoder, HpackError, TooLarge, encode

# RFC 7541, appendices C.3, C.4 (with Huffman coding) and C.6 (a table of 256 bytes).
FIRST = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")]
REQUESTS = [
    FIRST,
    [*FIRST, ("cache-control", "no-cache")],
    [
        (":method", "GET"),
        (":scheme", "https"),
        (":path", "/index.html"),
        (":authority", "www.example.com"),
        ("custom-key", "custom-value"),
    ],
]
PLAIN = (
    "828684410f7777772e6578616d706c652e636f6d",
    "828684be58086e6f2d6361636865",
    "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
)
CODED = (
    "828684418cf1e3c2e5f23a6ba0ab90f4ff",
    "828684be5886a8eb10649cbf",
    "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
)
RESPONSES = (
    "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff"
    "6e919d29ad171863c78f0b97c8e9ae82ae43d3",
    "4883640effc1c0bf",
    "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab"
    "77ad94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f"
    "9587316065c003ed4ee5b1063d5007",
)


@pytest.mark.parametrize("blocks", [PLAIN, CODED], ids=["plain", "huffman"])
def test_the_requests_of_the_standard_are_read_with_their_dynamic_table(
    blocks: tuple[str, ...],
) -> None:
    decoder = Decoder()
    assert [decoder.decode(bytes.fromhex(block)) for block in blocks] == REQUESTS
    assert decoder.changes == 3


def test_the_responses_of_the_standard_are_read_with_a_table_that_evicts() -> None:
    decoder = Decoder(256)
    first, second, third = (decoder.decode(bytes.fromhex(block)) for block in RESPONSES)
    assert first == [
        (":status", "302"),
        ("cache-control", "private"),
        ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
        ("location", "https://www.example.com"),
    ]
    assert second == [(":status", "307"), *first[1:]]
    cookie = "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
    assert third == [
        (":status", "200"),
        ("cache-control", "private"),
        ("date", "Mon, 21 Oct 2013 20:13:22 GMT"),
        ("location", "https://www.example.com"),
        ("content-encoding", "gzip"),
        ("set-cookie", cookie),
    ]


def test_literals_are_read_with_and_without_names_of_the_table() -> None:
    block = FORGET + b"\x88" + b"\x00\x01a\x01b" + b"\x0f\x10\x02hi" + b"\x10\x01c\x00"
    decoder = Decoder(0)
    assert decoder.decode(block) == [
        (":status", "200"),
        ("a", "b"),
        ("content-type", "hi"),
        ("c", ""),
    ]
    long = [("name", "v" * 1000), ("k" * 127, "\xff")]
    assert Decoder().decode(encode(long)) == long


def test_a_literal_larger_than_the_table_empties_it() -> None:
    decoder = Decoder(64)
    decoder.decode(b"\x40\x01a\x01b")
    decoder.decode(b"\x40\x01a\x40" + b"x" * 64)
    with pytest.raises(HpackError, match="no table has"):
        decoder.decode(b"\xbe")


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # index 0
        b"\xbe",  # an entry of an empty table
        b"\xff\xff\xff\xff\xff\xff\x7f",  # an endless integer
        b"\x00\x05ab",  # a string cut off
        b"\x00",
        b"\x40\x01",
        b"\x3f\xe2\x1f",  # a table above 4096 bytes
        b"\x88\x20",  # the table's size within a block
        b"\x00\x01a\x81\xff\x00",  # padding of eight ones
        b"\x00\x01a\x81\xfe",  # padding that is not ones
        b"\x00\x01a\x84\xff\xff\xff\xff",  # the end-of-string code
    ],
)
def test_blocks_that_make_no_sense_are_errors(block: bytes) -> None:
    with pytest.raises(HpackError):
        Decoder().decode(block)


def test_headers_above_the_limit_are_refused_and_the_table_stays_right() -> None:
    decoder = Decoder(max_list_bytes=1000)
    decoder.decode(b"\x40\x01a\x7f\x21" + b"x" * 160)
    with pytest.raises(TooLarge):
        # 161 + 32 bytes each, for one byte each.
        decoder.decode(b"\xbe" * 100 + b"\x40\x01b\x01c")
    assert decoder.decode(b"\xbe") == [("b", "c")]


def test_every_byte_has_its_code() -> None:
    """Canonical codes of 256 symbols and an end: the bits of each, from the standard's lengths."""
    codes = {"0": "00000", "a": "00011", " ": "010100", "X": "11111100", "!": "1111111000"}
    for character, bits in codes.items():
        padded = bits + "1" * (-len(bits) % 8)
        coded = int(padded, 2).to_bytes(len(padded) // 8, "big")
        assert huffman.decode(coded) == character.encode()
