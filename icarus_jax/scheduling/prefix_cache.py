"""The prefix cache as sequences see it: the names of their pages, cached pages, and pages that are being computed.

Host only. The page pool keeps the cached pages; here is what links them to sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from typing import Protocol

from icarus_jax.scheduling.page_keys import Chain, page_key
from icarus_jax.scheduling.page_pool import Content, Match, PagePool
from icarus_jax.scheduling.registry import NEVER
from icarus_jax.scheduling.sequence import Sequence
from icarus_jax.scheduling.sessions import Sessions

LOAD_TOKENS = 1024  # whose pages are moved at once, at most: the device holds them twice meanwhile


def load_pages(page_size: int) -> int:
    """Returns the most pages of one load.

    Args:
        page_size: Tokens per page.
    """
    return max(1, LOAD_TOKENS // page_size)


class Loader(Protocol):
    """Loads pages that were saved outside of the device (engine/page_mover.py)."""

    def load(self, prefix: list[bytes], contents: list[Content]) -> bool:
        """Begins to look for pages, and does not wait.

        Args:
            prefix: The keys of the cached pages that they continue.
            contents: What the pages hold, in order.

        Returns:
            False if it would not pay.
        """
        ...


class PrefixCache:
    """Names the pages of sequences, finds and adds cached ones, and knows which ones are being computed or loaded.

    Private sequences neither find cached pages nor leave any.

    Attributes:
        loader: Loads saved pages; None if there are none.
        loading: The keys of the pages that it is looking for.
        filled: The full pages (page, key) that are to be saved, as long as they are cached. Empty without a loader.
    """

    def __init__(self, pool: PagePool, window: int | None = None):
        """Starts without sequences.

        Args:
            pool: The pool that keeps the pages.
            window: How many positions a row sees, up to its own, in every layer. None: in some layer it sees all.
        """
        self._pool = pool
        self._window = window
        self._pending: dict[bytes, int] = {}  # key of a page being computed -> id of the sequence that computes it
        self.loader: Loader | None = None
        self.loading: set[bytes] = set()
        self.filled: deque[tuple[int, bytes]] = deque()

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

    def match_with_room(self, seq: Sequence, sessions: Sessions) -> Match | None:
        """Finds the sequence's cached pages, and makes room for the others.

        Args:
            seq: A waiting sequence.
            sessions: Those that expire are released as far as room is needed.

        Returns:
            The cached pages, not held yet; None if there is no room.
        """
        while True:  # a session that is released may be the one that held the cached pages: they are counted anew
            match = self.match(seq)
            need = -(-len(seq.tokens) // self._pool.page_size) - len(match.pages)
            idle = sum(self._pool.refs[page] == 0 for page in match.pages)  # num_free counts them until they are held
            if need + idle <= self._pool.num_free:
                return match
            if not sessions.could_free(need + idle, match.pages) or not sessions.release_next():
                return None

    def written_for(self, model: str, match: Match) -> int:
        """Returns how many of the cached tokens were first written for a model.

        Args:
            model: The model's name.
            match: Cached pages.
        """
        tokens = self._pool.page_size * sum(self._pool.model_of(page) == model for page in match.pages)
        if match.tail_page is not None and self._pool.model_of(match.tail_page) == model:
            tokens += match.tail_len
        return tokens

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

    def is_coming(self, seq: Sequence, match: Match, to_compute: list[bytes]) -> bool:
        """Returns whether the next page that a waiting sequence needs is being computed or loaded.

        If neither is so, and there is a loader, it is asked for the pages. A sequence asks again only if it has more
        cached pages than the last time, so that it never waits for ever.

        Args:
            seq: The sequence.
            match: Its cached pages.
            to_compute: The keys of the other pages (`keys_to_compute`).
        """
        if not to_compute:
            return False
        if to_compute[0] in self._pending or to_compute[0] in self.loading:
            return True
        first = len(match.pages)
        if self.loader is None or first <= seq.pages_before_load:
            return False
        seq.pages_before_load = first
        contents = self._contents(seq, first)
        if not contents or not self.loader.load(seq.page_keys[:first], contents):
            return False
        self.loading.update(content.key for content in contents)
        return True

    def _contents(self, seq: Sequence, first: int) -> list[Content]:
        """Returns what a sequence's pages from `first` on hold: full ones of the trunk that are not being loaded."""
        size, last = self._pool.page_size, min(len(seq.page_keys), first + load_pages(self._pool.page_size))
        last = min(last, seq.chain.start) if seq.chain.salt else last
        last = next((i for i in range(first, last) if seq.page_keys[i] in self.loading), last)
        parts = [(i, tuple(seq.tokens[i * size : (i + 1) * size])) for i in range(first, last)]
        parent = lambda i: seq.chain.parent(seq.page_keys, i)  # noqa: E731
        return [Content(parent(i), tokens, seq.page_keys[i], seq.model.name) for i, tokens in parts]

    def make_places(self, prefix: Seq[bytes], contents: Seq[Content]) -> tuple[list[int], list[int | None]]:
        """Allocates places for loaded pages, as far as there is room. `put` must follow.

        Args:
            prefix: The keys of the pages that they continue. If one is not cached any more, there are no places.
            contents: What the pages hold.

        Returns:
            The pages of `prefix` and then those of `contents`, held. And for each of the latter the page that is to be
            written; None if it is cached by now.
        """
        table = [page for key in prefix if (page := self._pool.page_of(key)) is not None]
        targets: list[int | None] = []
        if len(table) < len(prefix):
            return [], []
        self._pool.hold(table)
        for content in contents:
            page = self._pool.page_of(content.key)
            targets.append(None)
            if page is not None:
                self._pool.hold([page])
            elif self._pool.num_free:
                page = targets[-1] = self._pool.allocate()
            else:
                return table, targets[:-1]
            table.append(page)
        return table, targets

    def put(self, table: list[int], contents: Seq[Content]) -> None:
        """Caches loaded pages. Nobody holds them then.

        Args:
            table: What `make_places` returned. The pages hold their contents by now.
            contents: What the last of them hold.
        """
        for page, content in zip(table[len(table) - len(contents) :], contents, strict=True):
            self._pool.register(page, content)
        self._pool.release(table)

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
        one_more = before >= seq.prompt_len and seq.num_stored == before + 1
        if seq.private or (one_more and seq.num_stored % size):
            return
        for i in range(before // size, seq.num_stored // size):
            parent, tokens = seq.chain.parent(seq.page_keys, i), seq.tokens[i * size : (i + 1) * size]
            if i == len(seq.page_keys):
                seq.page_keys.append(page_key(parent, tokens))
            self._register(seq, i, parent, tokens, seq.page_keys[i])
        prefilled = before < seq.prompt_len or seq.num_stored - before > 1
        if prefilled and seq.num_stored == len(seq.tokens):
            self.add_tail(seq)

    def keys_to_save(self, seq: Sequence) -> list[bytes] | None:
        """Returns the names of the sequence's full pages; None if a head has made K/V of one: such are not saved."""
        full = seq.num_stored // self._pool.page_size
        return None if seq.chain.salt and full > seq.chain.start else seq.page_keys[:full]

    def add_tail(self, seq: Sequence) -> None:
        """Caches the sequence's partly filled last page."""
        size = self._pool.page_size
        full = seq.num_stored // size
        tail = seq.tokens[full * size : seq.num_stored]
        if tail and len(seq.page_keys) >= full and not seq.private:
            parent = seq.chain.parent(seq.page_keys, full)
            self._register(seq, full, parent, tail, page_key(parent, tail))

    def free_unseen(self, seq: Sequence) -> None:
        """Gives back the pages of a running sequence that no row of it will see again.

        They stay cached until they are evicted, like those of a sequence that has ended: a later prompt begins with all
        pages of its prefix, whether it sees them or not. A sequence keeps pages that its session will retain, or that
        are to be compared (private), and those of a prompt whose log-probabilities are not known yet.
        """
        retained = seq.session is not None and seq.session.retain_s is not None
        scored = seq.params.prompt_logprobs is not None and not seq.num_output
        if self._window is None or seq.private or retained or scored:
            return
        # The position before num_stored is the first that a row may still have: its token is sampled from there.
        unseen = max(0, seq.num_stored - self._window) // self._pool.page_size
        self._pool.release(seq.page_table[seq.num_freed : unseen])
        seq.num_freed = max(seq.num_freed, unseen)

    def release(self, seq: Sequence, useful: bool) -> None:
        """Takes all pages from a sequence.

        Args:
            seq: A sequence that runs no more.
            useful: False: its pages are evicted before all others.
        """
        self._pool.release(seq.held_pages, useful)
        seq.page_table, seq.num_freed, seq.pages_before_load = [], 0, -1
        self.forget(seq)

    def _register(self, seq: Sequence, i: int, parent: bytes, tokens: list[int], key: bytes) -> None:
        is_new = self._pool.register(seq.page_table[i], Content(parent, tuple(tokens), key, seq.model.name))
        self._pending.pop(key, None)
        # A head's own K/V is not saved: what its pages are named for does not outlive the process.
        own = bool(seq.chain.salt) and i >= seq.chain.start
        if is_new and self.loader is not None and len(tokens) == self._pool.page_size and not own:
            self.filled.append((seq.page_table[i], key))
