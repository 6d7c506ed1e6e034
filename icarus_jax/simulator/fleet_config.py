"""What a simulated fleet is, and what it did. Host only."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Sequence

from icarus_jax.config import EngineConfig
from icarus_jax.simulator.token_gaps import TokenGaps
from icarus_jax.workloads.workload import Session


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """A fleet.

    Attributes:
        replicas: The number of replicas that answer.
        kind: How the models use the KV cache: 'shared', or 'isolated', where each has K/V of its own.
        mean_up_s: The mean time from a replica's start to its failure, exponentially distributed; inf: none fails.
        down_s: How long a replica that has failed is gone.
        store_bytes: The size of the page store; 0: there is none. The least recently used conversations go first.
        store_bandwidth: Bytes/s at which a replica loads from it, and a prefill replica saves to it.
        seed: The seed of failures and of the router.
        prefill_replicas: The number of further replicas, which only compute prompts; the others load them from the page
            store.
        max_local_prefill_tokens: A prompt of which more tokens have to be computed goes to a prefill replica first.
    """

    replicas: int
    kind: str = "shared"
    mean_up_s: float = math.inf
    down_s: float = 60.0
    store_bytes: float = 0.0
    store_bandwidth: float = 10e9
    seed: int = 0
    prefill_replicas: int = 0
    max_local_prefill_tokens: int = 512

    def __post_init__(self):
        if self.replicas < 1 or self.kind not in ("shared", "isolated"):
            raise ValueError(f"{self.replicas} replicas of kind {self.kind!r}: at least 1, shared or isolated")
        for name in ("mean_up_s", "down_s", "store_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("store_bytes", "prefill_replicas", "max_local_prefill_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite and not below 0")
        if self.prefill_replicas and not self.store_bytes:
            raise ValueError("prefill replicas need a page store: store_bytes above 0")


@dataclasses.dataclass
class FleetResult:
    """What a fleet did.

    Attributes:
        ttft_s: The time to first token of each call that was answered, retries included.
        call_s: The time to its last token.
        session_s: The time from a session's arrival to its last token, of each session that finished.
        gaps: The time between two tokens of a call.
        finished: The number of those sessions.
        failed: Sessions a call of which failed ATTEMPTS times.
        retried: Calls that were sent to another replica, as theirs failed.
        failures: Failures of replicas.
        prompt_tokens: Tokens of the prompts of all calls that were answered.
        output_tokens: Tokens that these generated.
        prefill_tokens: Prompt tokens that were computed.
        loaded_tokens: Tokens that were loaded from the page store.
        prefills: Prompts that prefill replicas computed.
        duration_s: When the last session ended.
    """

    ttft_s: array = dataclasses.field(default_factory=lambda: array("f"))
    call_s: array = dataclasses.field(default_factory=lambda: array("f"))
    session_s: array = dataclasses.field(default_factory=lambda: array("f"))
    gaps: TokenGaps = dataclasses.field(default_factory=TokenGaps)
    finished: int = 0
    failed: int = 0
    retried: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefill_tokens: int = 0
    loaded_tokens: int = 0
    prefills: int = 0
    duration_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were not computed."""
        return 1 - self.prefill_tokens / max(1, self.prompt_tokens)


def check_room(sessions: Sequence[Session], caches: int, engine: EngineConfig) -> None:
    """Checks that every call fits into the pages beside the common start, which each cache holds once.

    Args:
        sessions: The sessions.
        caches: How many K/V caches a replica has: one, or one for each model.
        engine: The sizes of a replica's engine.

    Raises:
        ValueError: A call does not fit.
    """
    longest = max(turn.prompt_len + turn.output_len - session[0].common_len for session in sessions for turn in session)
    common = caches * max(session[0].common_len for session in sessions)
    room = engine.num_pages * engine.page_size - common
    if longest > room:
        raise ValueError(
            f"a call has {longest} tokens of its own; beside {common} tokens of common starts, a replica's pages have "
            f"room for {max(0, room)}"
        )
