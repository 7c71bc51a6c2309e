"""Values that a careful sender never writes: for header fields, for properties, for what JSON can say."""

from __future__ import annotations

import bz2
import functools
import lzma
import math
import struct
import zlib
from typing import Any

from hypothesis import strategies as st

from integration.fuzz.amqp import Field, Pairs, long_string

MEBIBYTE = 1 << 20
ESCAPES = "\x1b]0;gone\x07\x1b[2J"
FORGED = "x\n[2026-01-01 00:00:00,000: CRITICAL/MainProcess] all is lost\r\n"
TEXTS = (
    "", " ", "x" * 255, "x" * 256, "x" * 5_000, "x" * 60_000, "ü" * 40_000, ESCAPES, FORGED, "\0", "a\u202eb\u2028c\x85d",
    "%s%n%(id)s", "{0.__class__}", "../../../etc/passwd", "😀" * 300, "NaN", "-1", "None", "1e999", "\x7f\x9b31m",
)  # fmt: skip
# Not UTF-8: no text at all, half a surrogate pair, a cut character.
BYTES = (b"\xff\xfe\x00", b"\xed\xa0\x80", b"abc\xc3", bytes(range(256)), b"\x80" * 50_000)
NUMBERS = (0, -1, 1, 255, 2**31, 2**63 - 1, -(2**63), 0.5, -0.0, 1e300, 5e-324, True, False)
TIMES = tuple(Field(b"T", struct.pack(">Q", at)) for at in (0, 1_800_000_000, 253_402_300_800, 2**63, 2**64 - 1))
ODD_FIELDS = (
    *TIMES,
    *(Field(b"D", bytes([scale]) + struct.pack(">i", digits)) for scale, digits in ((0, 1), (2, -1), (255, 2**31 - 1))),
    Field(b"x", long_string(b"\0\xff" * 20)), Field(b"f", struct.pack(">f", 0.1)), Field(b"s", b"\x80\x00"),
    Field(b"b", b"\x80"), Field(b"B", b"\xff"), Field(b"u", b"\xff\xff"), Field(b"i", b"\xff\xff\xff\xff"),
    Field(b"l", struct.pack(">q", -1)),
)  # fmt: skip
MOMENTS = (
    "soon", "2026-13-45", "0001-01-01T00:00:00", "9999-12-31T23:59:59.999999-14:00", "9999-12-31T23:59:59+00:00",
    "10000-01-01T00:00:00", "2000-01-01T00:00:00Z", "2000-01-01", "2030-01-01T00:00:00+00:00", "2030-W01-1", "x" * 60_000,
    "2030-01-01T00:00:00+23:59", "20300101T000000", "2000-01-01T00:00:00\n", "１９９９-01-01T00:00:00",
)  # fmt: skip


@functools.lru_cache(maxsize=16)
def nested(depth: int, kind: bytes) -> Field:
    """Lists (`A`) or tables (`F`) within each other."""
    payload = b""
    for _ in range(depth):
        payload = long_string((b"\x01k" if kind == b"F" else b"") + kind + (payload or long_string(b"")))
    return Field(kind, payload)


NESTED = tuple(nested(depth, kind) for kind in (b"A", b"F") for depth in (3, 30, 300, 900))
WIDE: tuple[Any, ...] = (
    [None] * 20_000,
    {f"k{n}": n for n in range(3_000)},
    Pairs(((b"k", 1), (b"k", 2), (b"\xff", 3))),
)


def field_values() -> st.SearchStrategy[Any]:
    """For a header field."""
    simple = st.one_of(
        st.none(),
        st.sampled_from(NUMBERS),
        st.sampled_from(TEXTS),
        st.sampled_from(BYTES),
        st.sampled_from(MOMENTS),
        st.sampled_from(ODD_FIELDS),
        st.text(max_size=20),
    )
    return st.one_of(
        simple,
        simple,
        st.sampled_from(NESTED),
        st.sampled_from(WIDE),
        st.lists(simple, max_size=3),
        st.dictionaries(st.sampled_from(["task", "id", "a", "x-death", "\x1b[31m", "0", ""]), simple, max_size=3),
    )


# JSON has no limits: numbers without an end, the three that are none, what our own decoder builds objects from.
JSON_VALUES: tuple[Any, ...] = (
    None, 0, -1, 2**63, 10**300, -(10**4000), 1e308, math.nan, math.inf, -math.inf, True, "", *TEXTS[2:],
    [], {}, [[]], {"": {}}, "\ud800", {"\ud800": "\udfff"}, [None] * 50_000, {str(n): n for n in range(5_000)},
    {"__type__": "datetime", "__value__": "x"}, {"__type__": "datetime", "__value__": 5}, {"__type__": [], "__value__": {}},
    {"__type__": "decimal", "__value__": "NaN"}, {"__type__": "decimal", "__value__": "1E+999999999"},
    {"__type__": "uuid", "__value__": "0"}, {"__type__": "bytes", "__value__": "ü"}, {"__type__": "base64", "__value__": "*"},
    {"__type__": "no such", "__value__": None}, {"__type__": "date", "__value__": "10000-01-01"}, *MOMENTS,
)  # fmt: skip


def json_values() -> st.SearchStrategy[Any]:
    """For an argument, or any place of a body."""
    simple = st.one_of(st.sampled_from(JSON_VALUES), st.text(max_size=20), st.integers(), st.floats())
    return st.one_of(
        simple, simple, st.lists(simple, max_size=4), st.dictionaries(st.text(max_size=5), simple, max_size=3)
    )


@functools.lru_cache(maxsize=8)
def bomb(method: str, mebibytes: int) -> bytes:
    """A body that unpacks to `[[2,2],{},{}]` and so much blank."""
    plain = b"[[2, 2], {}, {}" + b" " * (mebibytes * MEBIBYTE) + b"]"
    match method:
        case "application/x-bz2":
            return bz2.compress(plain, 1)
        case "application/x-lzma":
            return lzma.compress(plain, preset=0)
    return zlib.compress(plain, 1)


RAW_BODIES = (
    b"", b"null", b"[]", b"{}", b"[[],{}]", b"[[],{},{},{}]", b"[1,2,3]", b'[{"a":1},[],{}]', b'"' + b"x" * 70_000 + b'"',
    b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"9" * 100_000, b"[[" + b"9" * 5_000 + b"],{},{}]",
    b"\xff\xfe[\x00]\x00", b"\xef\xbb\xbf[[2,2],{},{}]", b"\x80\x04.", b"\xdd\xff\xff\xff\xff", b"\xc1", b"\x91" * 2_000,
    b"a: &a [x]\nb: *a\n*c", b"!!python/object/apply:os.system ['true']", b"[[" + b"{},".join([b""] * 30_000) + b"{}],{},{}]",
    b"&a [[2, 2], {}, *a]", b"[[2, 2], {}, {}]\n...\n--- x", b"{" * 3_000, b"- " * 3_000,
)  # fmt: skip
CONTENT_TYPES = (
    "", "application/json", "application/x-python-serialize", "application/x-yaml", "application/x-msgpack", "text/plain",
    "application/data", "application/json; charset=utf-8", "APPLICATION/JSON", "x" * 255, b"\xff\xfe", ESCAPES, FORGED, "json",
)  # fmt: skip
ENCODINGS = (
    "", "utf-8", "UTF8", "utf_8_sig", "utf-16", "utf-7", "us-ascii", "latin-1", "punycode", "idna", "rot13", "hex", "zlib_codec",
    "bz2_codec", "unicode_escape", "raw_unicode_escape", "undefined", "base64", "binary", "no-such", "\0", b"\xff", "x" * 255,
)  # fmt: skip
COMPRESSIONS: tuple[Any, ...] = (
    "application/x-gzip", "application/gzip", "application/x-bz2", "application/x-lzma", "application/zstd", "gzip", "zlib",
    "no such", "", 5, None, [], {}, ["application/x-gzip"], True, b"\xff", "application/x-brotli",
)  # fmt: skip
