"""How bodies are compressed, and read no further than they may unpack to. The values of the header are kombu's."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

from amqtask.exceptions import ConfigurationError, Undecodable
from amqtask.ground.printable import printable
from amqtask.protocol.serialization import LARGEST_BODY, is_own, missing, too_large

# The largest window that a compressed body may need, and how many compressed streams may follow each other.
_MOST_MEMORY = 128 * 1024 * 1024
_MOST_STREAMS = 100
# One byte of zstd becomes some tens of kilobytes at most; so it is decompressed in pieces of so many bytes.
_ZSTD_PIECE = 256


def _bz2_compress(body: bytes) -> bytes:
    import bz2

    return bz2.compress(body)


def _bz2_stream() -> Any:
    import bz2

    return bz2.BZ2Decompressor()


def _lzma_compress(body: bytes) -> bytes:
    import lzma

    return lzma.compress(body)


def _lzma_stream() -> Any:
    import lzma

    return lzma.LZMADecompressor(memlimit=_MOST_MEMORY)


def _zstd_compress(body: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(body)


class _Unpacked:
    """The decompressed output so far, and how much more is allowed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._pieces: list[bytes] = []

    @property
    def room(self) -> int:
        """The most bytes to decompress: one more than allowed, which shows whether there is more."""
        return self._limit - self._size + 1

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            raise too_large(self._limit)
        self._pieces.append(piece)

    def __bytes__(self) -> bytes:
        return b"".join(self._pieces)


def _zstd_decompress(body: bytes, output: _Unpacked) -> None:
    import zstandard

    # A stream may come without its size, which only this interface reads; a torn end looks like a pause to it.
    stream = zstandard.ZstdDecompressor(max_window_size=_MOST_MEMORY).decompressobj()
    for start in range(0, len(body), _ZSTD_PIECE):
        output.add(stream.decompress(body[start : start + _ZSTD_PIECE]))
        if stream.eof:
            return
    raise ValueError(_TORN)


def _gunzip(body: bytes, output: _Unpacked) -> None:
    # kombu writes zlib streams under the gzip content type; other producers write real gzip. 32: either.
    stream = zlib.decompressobj(32 + zlib.MAX_WBITS)
    packed = body
    while not stream.eof:
        piece = stream.decompress(packed, output.room)
        packed = stream.unconsumed_tail
        if not piece and not packed and not stream.eof:
            raise ValueError(_TORN)
        output.add(piece)


def _unpack(open_stream: Callable[[], Any]) -> Callable[[bytes, _Unpacked], None]:
    def unpack(body: bytes, output: _Unpacked) -> None:
        packed = body
        for _ in range(_MOST_STREAMS):
            stream = open_stream()
            while not stream.eof:
                output.add(stream.decompress(packed, output.room))
                if stream.needs_input:
                    raise ValueError(_TORN)
                packed = b""
            packed = stream.unused_data
            if not packed:
                return
        raise ValueError("too many streams after each other")

    return unpack


_TORN = "the stream ends too early"


_COMPRESSION_NAMES = {
    "gzip": "application/x-gzip",
    "zlib": "application/x-gzip",
    "bz2": "application/x-bz2",
    "bzip": "application/x-bz2",
    "bzip2": "application/x-bz2",
    "lzma": "application/x-lzma",
    "xz": "application/x-lzma",
    "zstd": "application/zstd",
    "zstandard": "application/zstd",
}
_COMPRESS: Mapping[str, tuple[Callable[[bytes], bytes], Callable[[bytes, _Unpacked], None]]] = {
    "application/x-gzip": (zlib.compress, _gunzip),
    "application/x-bz2": (_bz2_compress, _unpack(_bz2_stream)),
    "application/x-lzma": (_lzma_compress, _unpack(_lzma_stream)),
    "application/zstd": (_zstd_compress, _zstd_decompress),
}


COMPRESSIONS = tuple(sorted(_COMPRESSION_NAMES))


def compression_type(method: str) -> str:
    """The value of the `compression` header for a method's name, or for itself. Raises: ConfigurationError."""
    mime_type = _COMPRESSION_NAMES.get(method, method)
    if mime_type not in _COMPRESS:
        raise ConfigurationError(f"no compression {method!r}; there are: {', '.join(COMPRESSIONS)}")
    return mime_type


def compress(body: bytes, method: str) -> tuple[bytes, str]:
    """The compressed body and the value of the `compression` header. Raises: ConfigurationError."""
    mime_type = compression_type(method)
    try:
        return _COMPRESS[mime_type][0](body), mime_type
    except ImportError as error:
        raise missing("zstd") from error


def decompress(body: bytes, header_value: object, limit: int = LARGEST_BODY) -> bytes:
    """The body as it was before `compress`, if that has at most `limit` bytes. Raises: Undecodable."""
    mime_type = _COMPRESSION_NAMES.get(header_value, header_value) if isinstance(header_value, str) else ""
    if mime_type not in _COMPRESS:
        raise Undecodable(f"the body is compressed with {printable(repr(header_value), 200)}, which is not known here")
    output = _Unpacked(limit)
    try:
        _COMPRESS[mime_type][1](body, output)
    except Undecodable:
        raise
    except Exception as error:
        if not is_own(error, lambda: _COMPRESS[mime_type][1](body, _Unpacked(limit))):
            raise
        raise Undecodable(f"the body is not valid {mime_type}: {error}") from error
    return bytes(output)
