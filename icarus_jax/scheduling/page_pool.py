"""The page pool: allocation, reference counts and the prefix cache. Host only.

A page is named by the chain of tokens up to its end: `key = hash(parent key, tokens)`. The name says nothing of the
head that asked for it, which is why one head's pages are a hit for every other; only where a head makes K/V of its own
does its salt enter the chain. A page that is only partly filled is cached too: it is copied, or, when nobody holds it
and the new prompt continues it exactly, taken over.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Sequence as Tokens


class OutOfPages(Exception):
    """No page is free and none can be evicted."""


def page_key(parent: bytes, tokens: Tokens[int]) -> bytes:
    """The name of a page (full or partial) that holds `tokens` after the prefix `parent`."""
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class Chain:
    """How a sequence's pages are named: by their tokens alone, and from page `start` on by `salt` too."""

    salt: str = ""
    start: int = 0

    def parent(self, keys: Tokens[bytes], page: int) -> bytes:
        """What the name of page number `page` is derived from; `keys` are those of the pages before it."""
        key = keys[page - 1] if page else b""
        if self.salt and page == self.start:
            return hashlib.blake2b(key + self.salt.encode(), digest_size=16).digest()
        return key

    def keys(self, tokens: Tokens[int], page_size: int, known: list[bytes] | None = None) -> list[bytes]:
        """Keys of the full pages of `tokens`, continuing the list `known` of its first pages."""
        keys = list(known or ())
        for page in range(len(keys), len(tokens) // page_size):
            keys.append(page_key(self.parent(keys, page), tokens[page * page_size : (page + 1) * page_size]))
        return keys


@dataclasses.dataclass(frozen=True)
class Content:
    """What a cached page holds: its place in the chain, its tokens, and the model that was first to write it."""

    parent: bytes
    tokens: tuple[int, ...]
    key: bytes
    model: str


@dataclasses.dataclass(frozen=True)
class Match:
    """Cached pages for a prompt: whole ones, and at most one page of which `tail_len` tokens can be copied."""

    pages: list[int]
    tail_page: int | None
    tail_len: int


class PagePool:
    """`num_pages` pages of `page_size` tokens. Raises OutOfPages; never hands out a page that somebody holds."""

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True):
        self.num_pages, self.page_size, self.caching = num_pages, page_size, enable_prefix_caching
        self.refs = [0] * num_pages
        self.evictions = 0
        self._free = list(range(num_pages - 1, -1, -1))  # hold nothing worth keeping
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, held by nobody; oldest first
        self._content: dict[int, Content] = {}
        self._by_key: dict[bytes, int] = {}
        self._children: defaultdict[tuple[bytes, int], dict[int, tuple[int, ...]]] = defaultdict(dict)

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def model_of(self, page: int) -> str:
        return self._content[page].model

    def is_cached(self, key: bytes) -> bool:
        return key in self._by_key

    def num_cached_of(self, keys: Tokens[bytes]) -> int:
        """How many of the first pages named `keys` are cached."""
        return next((i for i, key in enumerate(keys) if key not in self._by_key), len(keys))

    def match(self, chain: Chain, tokens: Tokens[int], keys: list[bytes]) -> Match:
        """The longest cached prefix of `tokens`, whose full pages are named `keys`. Takes nothing."""
        if not self.caching:
            return Match([], None, 0)
        pages: list[int] = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            pages.append(page)
        parent = chain.parent(keys, len(pages))
        rest = tuple(tokens[len(pages) * self.page_size : (len(pages) + 1) * self.page_size])
        best, best_len = None, 0
        for page, held in self._children.get((parent, rest[0]), {}).items() if rest else ():
            length = next(
                (i for i, (a, b) in enumerate(zip(held, rest, strict=False)) if a != b), min(len(held), len(rest))
            )
            if length > best_len:
                best, best_len = page, length
        return Match(pages, best, best_len)

    def allocate(self) -> int:
        """A page of one's own; the least recently used cached page is evicted when none is empty."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self.evictions += 1
        else:
            raise OutOfPages
        self.refs[page] = 1
        return page

    def take(self, match: Match) -> tuple[list[int], list[tuple[int, int]]]:
        """Holds the matched pages. Returns the page table and the copies (src, dst) that must run before any write.

        On OutOfPages everything taken is given back.
        """
        for page in match.pages:
            self._hold(page)
        if match.tail_page is None:
            return list(match.pages), []
        tail = match.tail_page
        if self.refs[tail] == 0 and len(self._content[tail].tokens) == match.tail_len < self.page_size:
            self._hold(tail)
            self._forget(tail)
            return [*match.pages, tail], []
        try:
            copy = self.allocate()
        except OutOfPages:
            self.release(match.pages)
            raise
        return [*match.pages, copy], [(tail, copy)]

    def register(self, page: int, parent: bytes, tokens: Tokens[int], model: str) -> None:
        """Caches a held page's content (full or partial). A page whose content is cached already stays private."""
        if not self.caching or not tokens:
            return
        key = page_key(parent, tokens)
        if key in self._by_key:
            return
        first = self._content[page].model if page in self._content else model
        self._forget(page)
        content = Content(parent, tuple(tokens), key, first)
        self._content[page] = content
        self._by_key[key] = page
        self._children[parent, content.tokens[0]][page] = content.tokens

    def hold(self, pages: Tokens[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            self._hold(page)

    def release(self, pages: Tokens[int], useful: bool = True) -> None:
        """Gives pages back; the cached ones stay until evicted, the last of a sequence first, those not `useful`
        before all others."""
        for page in reversed(pages):
            self.refs[page] -= 1
            assert self.refs[page] >= 0, f"page {page} was given back twice"
            if self.refs[page] == 0:
                if page in self._content:
                    self._idle[page] = None
                    if not useful:
                        self._idle.move_to_end(page, last=False)
                else:
                    self._free.append(page)

    def clear(self) -> None:
        """Forgets every cached page that nobody holds."""
        for page in list(self._idle):
            self._forget(page)
            self._free.append(page)
        self._idle.clear()

    def _hold(self, page: int) -> None:
        self.refs[page] += 1
        self._idle.pop(page, None)

    def _forget(self, page: int) -> None:
        content = self._content.pop(page, None)
        if content is None:
            return
        del self._by_key[content.key]
        siblings = self._children[content.parent, content.tokens[0]]
        del siblings[page]
        if not siblings:
            del self._children[content.parent, content.tokens[0]]
