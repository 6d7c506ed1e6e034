"""The page pool: allocation, reference counts and the prefix cache. Host only.

Pages are cached under their keys (page_keys.py). Partly filled pages are cached too. A prompt that matches some of such
a page's tokens gets a copy of it. If nobody holds the page and the prompt continues it exactly, the prompt takes the
page itself.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence as Tokens
from typing import NamedTuple

from icarus_jax.scheduling.page_keys import Chain


class OutOfPages(Exception):
    """No page is free and none can be evicted."""


class Content(NamedTuple):
    """What a cached page holds.

    Attributes:
        parent: What the page's name is derived from (`Chain.parent`).
        tokens: The tokens whose K/V the page stores; fewer than the page size if it is partly filled.
        key: The page's name.
        model: The name of the model for which the page was first written.
    """

    parent: bytes
    tokens: tuple[int, ...]
    key: bytes
    model: str


@dataclasses.dataclass(frozen=True)
class Match:
    """The cached pages of a prompt.

    Attributes:
        pages: The full pages, which the prompt can share.
        tail_page: A page whose first tokens continue the prompt after `pages`; None if there is none.
        tail_len: How many tokens of `tail_page` the prompt can use.
    """

    pages: list[int]
    tail_page: int | None
    tail_len: int


class PagePool:
    """All pages of the KV cache, numbered from 0. A page that somebody holds is never handed out or evicted.

    Attributes:
        num_pages: The number of pages.
        page_size: Tokens per page.
        caching: Whether pages are kept for later prompts.
        refs: For each page, how many sequences and sessions hold it.
        evictions: How many cached pages have been given up for others.
        written_for: How many cached pages, held or not, were first written for each model; a model's count may be 0.
    """

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True):
        """Makes a pool of empty pages.

        Args:
            num_pages: The number of pages.
            page_size: Tokens per page.
            enable_prefix_caching: Whether to keep pages for later prompts.
        """
        self.num_pages = num_pages
        self.page_size = page_size
        self.caching = enable_prefix_caching
        self.refs = [0] * num_pages
        self.evictions = 0
        self.written_for: Counter[str] = Counter()
        self._free = list(range(num_pages - 1, -1, -1))  # pages without cached content
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, held by nobody; oldest first
        self._content: dict[int, Content] = {}
        self._by_key: dict[bytes, int] = {}
        # (parent, first token) -> the cached pages that start so, and their tokens
        self._children: defaultdict[tuple[bytes, int], dict[int, tuple[int, ...]]] = defaultdict(dict)

    @property
    def num_free(self) -> int:
        """How many pages can be allocated: the empty ones, and the cached ones that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """How many cached pages nobody holds."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """How many pages somebody holds."""
        return self.num_pages - self.num_free

    def model_of(self, page: int) -> str:
        """Returns the name of the model for which a cached page was first written."""
        return self._content[page].model

    def page_of(self, key: bytes) -> int | None:
        """Returns the cached page of this name; None if there is none."""
        return self._by_key.get(key)

    def num_cached_of(self, keys: Tokens[bytes]) -> int:
        """Returns how many pages are cached, counted from the first up to the first that is missing.

        Args:
            keys: The keys of a sequence's pages.
        """
        return next((i for i, key in enumerate(keys) if key not in self._by_key), len(keys))

    def match(self, chain: Chain, tokens: Tokens[int], keys: list[bytes]) -> Match:
        """Finds the longest cached prefix of a sequence. The pages are not held yet; `take` does that.

        Args:
            chain: How the sequence's pages are named.
            tokens: The tokens of the sequence.
            keys: The keys of its full pages.
        """
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
        candidates = self._children.get((parent, rest[0]), {}) if rest else {}
        for page, held in candidates.items():
            length = _common_length(held, rest)
            if length > best_len:
                best, best_len = page, length
        return Match(pages, best, best_len)

    def allocate(self) -> int:
        """Hands out a page to a single holder. If none is empty, the least recently used cached page is evicted.

        Raises:
            OutOfPages: Every page is held.
        """
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
        """Holds the matched pages. A tail page is copied to a page of its own, or taken itself if nobody else needs it.

        Args:
            match: What `match` found. No page may have been allocated in between.

        Returns:
            The page table, and the page copies (src, dst) that must run before any K/V is written.

        Raises:
            OutOfPages: There is no page for the copy. The matched pages are given back first.
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

    def register(self, page: int, content: Content) -> bool:
        """Puts a page into the prefix cache. If a page of the same name is cached already, it returns False.

        Args:
            page: A page that somebody holds.
            content: What it holds. If the page is cached already, the model for which it was first written stays.
        """
        if not self.caching or content.key in self._by_key:
            return False
        if page in self._content:
            content = content._replace(model=self._content[page].model)
            self._forget(page)
        self._content[page] = content
        self.written_for[content.model] += 1
        self._by_key[content.key] = page
        self._children[content.parent, content.tokens[0]][page] = content.tokens
        return True

    def hold(self, pages: Tokens[int]) -> None:
        """Adds a holder to each page.

        Args:
            pages: Pages that are cached or held.
        """
        for page in pages:
            self._hold(page)

    def release(self, pages: Tokens[int], useful: bool = True) -> None:
        """Removes a holder of each page. Cached pages that nobody holds then stay until they are evicted.

        Args:
            pages: The page table of a sequence. Its last pages are evicted first.
            useful: False: evict these pages before all others.
        """
        for page in reversed(pages) if useful else pages:  # its last page goes first either way
            self.refs[page] -= 1
            assert self.refs[page] >= 0, f"page {page} was given back twice"
            if self.refs[page] == 0:
                if page in self._content:
                    self._idle[page] = None
                    if not useful:
                        self._idle.move_to_end(page, last=False)
                else:
                    self._free.append(page)

    def rebuild(self, tables: Tokens[Tokens[int]], keep_content: bool) -> None:
        """Counts every page's holders anew, after a step that failed halfway.

        Args:
            tables: The page tables of all holders.
            keep_content: Whether cached pages still hold what they are named for; else the cache is emptied.
        """
        if not keep_content:
            self._content, self._by_key = {}, {}
            self.written_for.clear()
            self._children.clear()
        self.refs = [0] * self.num_pages
        for table in tables:
            for page in table:
                self.refs[page] += 1
        unheld = [page for page in range(self.num_pages) if not self.refs[page]]
        known = [page for page in self._idle if page in self._content and not self.refs[page]]  # in their old order
        later = [page for page in unheld if page in self._content and page not in self._idle]
        self._idle = OrderedDict.fromkeys([*known, *later])
        self._free = [page for page in reversed(unheld) if page not in self._content]

    def check(self, tables: Tokens[Tokens[int]]) -> None:
        """Checks that every page is in exactly one state, and that it has as many holders as there are.

        Args:
            tables: The page tables of all holders.

        Raises:
            AssertionError: The pool is inconsistent.
        """
        held = Counter(page for table in tables for page in table)
        assert self.refs == [held[page] for page in range(self.num_pages)], "reference counts are wrong"
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free) and not free & idle, "a page is free twice"
        assert free | idle == {page for page in range(self.num_pages) if not held[page]}, "a page is lost"
        assert idle <= set(self._content) and not free & set(self._content), "an empty page is cached"
        models = Counter(content.model for content in self._content.values())
        assert +self.written_for == models, "a model of a page is wrong"
        assert {content.key: page for page, content in self._content.items()} == self._by_key, "a name is wrong"

    def clear(self) -> None:
        """Empties every cached page that nobody holds."""
        for page in list(self._idle):
            self._forget(page)
            self._free.append(page)
        self._idle.clear()

    def _hold(self, page: int) -> None:
        self.refs[page] += 1
        self._idle.pop(page, None)

    def _forget(self, page: int) -> None:
        """Removes a page from the prefix cache, if it is there."""
        content = self._content.pop(page, None)
        if content is None:
            return
        self.written_for[content.model] -= 1
        del self._by_key[content.key]
        siblings = self._children[content.parent, content.tokens[0]]
        del siblings[page]
        if not siblings:
            del self._children[content.parent, content.tokens[0]]


def _common_length(a: Tokens[int], b: Tokens[int]) -> int:
    """Returns how many tokens two lists have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
