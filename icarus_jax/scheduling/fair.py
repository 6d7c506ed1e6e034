"""Fair shares of the engine for its tenants. Host only.

Each tenant has a tag: the tokens that the engine has computed for it, over its weight. Of the tenants that wait, the
one with the smallest tag goes first. A tenant that comes back takes at least the tag of those that have waited
meanwhile: what it did not use, it does not get later. (Start-time fair queueing: Goyal, Vin and Cheng, SIGCOMM 1996;
with tokens counted as they are computed: Sheng et al., arXiv 2401.00588.)
"""

from __future__ import annotations

from collections.abc import Iterable

from icarus_jax.scheduling.sequence import Sequence


class FairShare:
    """The tags of the tenants."""

    def __init__(self) -> None:
        self._tags: dict[str, float] = {}
        self._waiting: set[str] = set()  # who waited when the tags were last asked for
        self._now = 0.0  # the smallest tag of those that have waited all the time

    def charge(self, seq: Sequence, tokens: int) -> None:
        """Counts tokens that are computed for a sequence.

        Args:
            seq: The sequence.
            tokens: How many.
        """
        self._tags[seq.tenant] = self._tags.get(seq.tenant, 0.0) + tokens / seq.weight

    def tags(self, waiting: Iterable[str]) -> dict[str, float]:
        """Returns the tags of the tenants that wait.

        Args:
            waiting: The tenants of the waiting sequences.
        """
        tenants = set(waiting)
        stayed = [self._tags[tenant] for tenant in tenants & self._waiting]
        # If nobody has waited all the time, there was enough for everybody, and nobody owes anything.
        self._now = max(self._now, min(stayed) if stayed else max(self._tags.values(), default=0.0))
        for tenant in tenants - self._waiting:
            self._tags[tenant] = max(self._tags.get(tenant, 0.0), self._now)
        self._waiting = tenants
        return {tenant: self._tags[tenant] for tenant in tenants}
