"""Names of pages in the prefix cache. Host only.

A page's name, its *key*, is a hash of all tokens up to the page's end: `key = hash(parent key, tokens)`. The key does
not depend on the head, so a page that one head has left is a cache hit for every other head. Only a head that makes K/V
of its own adds its salt to the chain of keys, and a request that names a cache salt adds that one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Sequence as Tokens


def page_key(parent: bytes, tokens: Tokens[int]) -> bytes:
    """Returns the name of a page.

    Args:
        parent: What the name is derived from: the key of the page before it, b"" for the first page (`Chain.parent`).
        tokens: The tokens of the page; fewer than the page size if it is partly filled.

    Returns:
        16 bytes.
    """
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class Chain:
    """How the pages of a sequence are named.

    Attributes:
        salt: Text that sets the pages from `start` on apart from all others; '' if the tokens alone name them.
        start: The index of the first page that the salt applies to.
        cache_salt: Text of the client's that sets all pages apart from those of other cache salts; '' sets none apart.
    """

    salt: str = ""
    start: int = 0
    cache_salt: str = ""

    def parent(self, keys: Tokens[bytes], page: int) -> bytes:
        """Returns what the name of a page is derived from.

        Args:
            keys: The keys of the sequence's pages, at least of those before `page`.
            page: The index of the page.
        """
        key = keys[page - 1] if page else self._root()
        if self.salt and page == self.start:
            return hashlib.blake2b(key + self.salt.encode(), digest_size=16).digest()
        return key

    def _root(self) -> bytes:
        if not self.cache_salt:
            return b""
        salt = self.cache_salt.encode(errors="surrogatepass")
        return hashlib.blake2b(salt, digest_size=16, person=b"cache_salt").digest()  # no other name is made so

    def keys(self, tokens: Tokens[int], page_size: int, known: list[bytes] | None = None) -> list[bytes]:
        """Returns the keys of the full pages of a sequence.

        Args:
            tokens: The tokens of the sequence.
            page_size: Tokens per page.
            known: The keys of its first pages, as far as they are known already.
        """
        keys = list(known or ())
        for page in range(len(keys), len(tokens) // page_size):
            keys.append(page_key(self.parent(keys, page), tokens[page * page_size : (page + 1) * page_size]))
        return keys
