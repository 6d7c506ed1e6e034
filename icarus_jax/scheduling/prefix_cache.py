"""The prefix cache as sequences see it: the names of their pages, cached pages, and pages that are being computed.

Host only. The page pool keeps the cached pages; here is what links them to sequences.
"""

from __future__ import annotations

from icarus_jax.scheduling.page_keys import Chain, page_key
from icarus_jax.scheduling.page_pool import Match, PagePool
from icarus_jax.scheduling.registry import NEVER
from icarus_jax.scheduling.sequence import Sequence


class PrefixCache:
    """Names the pages of sequences, finds and adds cached ones, and knows which ones are being computed.

    Private sequences neither find cached pages nor leave any.
    """

    def __init__(self, pool: PagePool):
        """Starts without sequences.

        Args:
            pool: The pool that keeps the pages.
        """
        self._pool = pool
        self._pending: dict[bytes, int] = {}  # key of a page being computed -> id of the sequence that computes it

    def name_pages(self, seq: Sequence) -> None:
        """Sets how the sequence's pages are named. It depends on where its model starts to make K/V of its own."""
        seq.adapted_from = seq.model.adapted_from(seq.tokens)
        salt, start = "", 0
        if seq.adapted_from < NEVER:
            start, offset = divmod(seq.adapted_from, self._pool.page_size)
            # Of two pages with the same tokens one may be the trunk's up to a later token: the offset is in the name.
            salt = f"{seq.model.salt}@{offset}"
        seq.chain = Chain(salt, start, seq.cache_salt)
        seq.page_keys = []

    def match(self, seq: Sequence) -> Match:
        """Finds the cached pages of the sequence's tokens. They are not held yet."""
        if seq.private:
            return Match([], None, 0)
        return self._pool.match(seq.chain, seq.tokens, seq.page_keys)

    def keys_to_compute(self, seq: Sequence, match: Match) -> list[bytes]:
        """Returns the keys of the pages that the sequence has to compute, a partly filled last one included.

        Args:
            seq: A waiting sequence, all of whose full pages have keys.
            match: Its cached pages. If they cover all of its tokens, there is nothing to compute.
        """
        size = self._pool.page_size
        if seq.private or not self._pool.caching or len(match.pages) * size + match.tail_len >= len(seq.tokens):
            return []
        tail = seq.tokens[len(seq.page_keys) * size :]
        keys = seq.page_keys[len(match.pages) :]
        return [*keys, page_key(seq.chain.parent(seq.page_keys, len(seq.page_keys)), tail)] if tail else keys

    def is_pending(self, key: bytes) -> bool:
        """Returns whether a running sequence is computing the page of this name."""
        return key in self._pending

    def expect(self, seq: Sequence, keys: list[bytes]) -> None:
        """Notes that a sequence will compute the pages of these names, except those that another one computes."""
        self._pending.update((key, seq.seq_id) for key in keys if key not in self._pending)

    def forget(self, seq: Sequence) -> None:
        """Notes that a sequence computes nothing any more."""
        self._pending = {key: owner for key, owner in self._pending.items() if owner != seq.seq_id}

    def add_filled(self, seq: Sequence, before: int) -> None:
        """Caches the pages that have been filled. After a prefill, the last page is cached too.

        Args:
            seq: A running sequence.
            before: How many of its tokens were stored before the step.
        """
        size = self._pool.page_size
        if seq.private:
            return
        if seq.num_computed // size > len(seq.page_keys):
            seq.page_keys = seq.chain.keys(seq.tokens[: seq.num_computed], size, seq.page_keys)
        for i in range(before // size, seq.num_computed // size):
            parent = seq.chain.parent(seq.page_keys, i)
            self._pool.register(seq.page_table[i], parent, seq.tokens[i * size : (i + 1) * size], seq.model.name)
            self._pending.pop(seq.page_keys[i], None)
        prefilled = before < seq.prompt_len or seq.num_computed - before > 1
        if prefilled and seq.num_computed == len(seq.tokens):
            self.add_tail(seq)

    def add_tail(self, seq: Sequence) -> None:
        """Caches the sequence's partly filled last page."""
        size = self._pool.page_size
        full = seq.num_computed // size
        tail = seq.tokens[full * size : seq.num_computed]
        if tail and len(seq.page_keys) >= full and not seq.private:
            parent = seq.chain.parent(seq.page_keys, full)
            self._pool.register(seq.page_table[full], parent, tail, seq.model.name)
            self._pending.pop(page_key(parent, tail), None)
