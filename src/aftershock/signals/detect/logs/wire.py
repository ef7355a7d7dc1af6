"""The two binary containers of metrics, and the protocol-buffer fields inside: read without their packages, so that a
log is read as a stream and the version of the package that wrote it does not matter.

TensorBoard: TFRecord, each record `length u64, crc u32, data, crc u32`. W&B: LevelDB's log, blocks of 32 KiB of
fragments `crc u32, length u16, type u8, data` after a 7-byte file header. Must not import anything else of aftershock.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

BLOCK = 32_768
"""Size of a block of LevelDB's log (LevelDB, doc/log_format.md)."""
FRAGMENT_HEADER = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class Damaged(ValueError):
    """The container does not continue as its format says."""


def tfrecords(pieces: Iterable[bytes], limit: int = 1 << 28) -> Iterator[bytes]:
    """The records of a TFRecord stream. A record that is not whole yet waits for more; an empty piece starts anew.

    Raises Damaged when a length is above `limit`: nothing after it can be trusted.
    """
    data = b""
    for piece in pieces:
        data = data + piece if piece else b""
        at = 0
        while len(data) - at >= 12:
            (length,) = struct.unpack_from("<Q", data, at)
            if length > limit:
                raise Damaged(f"a record of {length} bytes")
            if len(data) - at < length + 16:
                break
            yield data[at + 12 : at + 12 + length]
            at += length + 16
        data = data[at:]


def leveldb_records(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The records of a W&B file. Raises Damaged when it does not start as one, or a fragment is of no known type."""
    data, at, record = b"", 0, b""  # `at`: offset of data[0] in the file
    started = False
    for piece in pieces:
        if not piece:
            data, at, record, started = b"", 0, b"", False
            continue
        data += piece
        used = 0
        if not started:
            if len(data) < FRAGMENT_HEADER:
                continue
            if data[:4] != b":W&B":
                raise Damaged("it does not start as a W&B file")
            used, started = FRAGMENT_HEADER, True
        while True:
            left = BLOCK - (at + used) % BLOCK
            if left < FRAGMENT_HEADER:  # padding at the end of a block
                if len(data) - used < left:
                    break
                used += left
                continue
            if len(data) - used < FRAGMENT_HEADER:
                break
            length, kind = struct.unpack_from("<HB", data, used + 4)
            if len(data) - used < FRAGMENT_HEADER + length:
                break
            body = data[used + FRAGMENT_HEADER : used + FRAGMENT_HEADER + length]
            used += FRAGMENT_HEADER + length
            if kind not in (FULL, FIRST, MIDDLE, LAST):
                raise Damaged(f"a fragment of type {kind}")
            record = body if kind in (FULL, FIRST) else record + body
            if kind in (FULL, LAST):
                yield record
        data, at = data[used:], at + used


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol-buffer message: an int for varints, bytes for everything else.

    Raises Damaged when the message ends within a field.
    """
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise Damaged(f"a field of wire type {kind}")
        if at + size > end:
            raise Damaged("a message that ends within a field")
        yield number, data[at : at + size]
        at += size


def signed(value: int) -> int:
    """A varint as the int64 it stands for."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise Damaged("a number that does not end")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
