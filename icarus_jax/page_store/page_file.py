"""A page as bytes: a header, then its K/V. A torn, altered or foreign page is recognised.

what kind of file it is, 16 bytes | the engine's identity, 16 | the page's key, 16 | checksum of all else, 16 | K/V
"""

from __future__ import annotations

import hashlib

MAGIC = b"icarus KV page 1"
DIGEST_BYTES = 16
HEADER_BYTES = len(MAGIC) + 3 * DIGEST_BYTES


def encode(identity: bytes, key: bytes, values: bytes | memoryview) -> bytes:
    """Returns a page as it is stored.

    Args:
        identity: Of the engine, 16 bytes: what K/V depends on beside tokens.
        key: The page's key, 16 bytes.
        values: Its K/V.
    """
    return b"".join((MAGIC, identity, key, _checksum(identity, key, values), values))


def decode(identity: bytes, key: bytes, size: int, data: bytes) -> memoryview | None:
    """Returns the K/V of a stored page; None if it is not that page, or not all of it.

    Args:
        identity: The identity that the page must have.
        key: The key that it must have.
        size: How many bytes its K/V must have.
        data: What was stored.
    """
    values = memoryview(data)[HEADER_BYTES:]
    if len(values) != size or data[:HEADER_BYTES] != MAGIC + identity + key + _checksum(identity, key, values):
        return None
    return values


def _checksum(identity: bytes, key: bytes, values: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(MAGIC + identity + key, digest_size=DIGEST_BYTES)
    digest.update(values)
    return digest.digest()
