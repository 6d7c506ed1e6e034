"""What the scheduler counts."""

from __future__ import annotations

import dataclasses

from icarus_jax.scheduling.sequence import Sequence


@dataclasses.dataclass
class SchedulerStats:
    """Counters since the start.

    Attributes:
        admitted: Sequences admitted for the first time.
        prompt_tokens: Their prompt tokens.
        prefill_tokens: Prompt tokens computed by writer rows, those computed again after a preemption included.
        cached_tokens_same_model: Prompt tokens found in the cache that were first written for the same model.
        cached_tokens_cross_model: Prompt tokens found in the cache that were first written for another model.
        generated_tokens: Tokens generated.
        preemptions: How often a sequence has lost its pages to another.
        handoffs: How often another model went on with a sequence.
    """

    admitted: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens_same_model: int = 0
    cached_tokens_cross_model: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    handoffs: int = 0

    def count_admission(self, seq: Sequence, same_model: int) -> None:
        """Counts a sequence that was admitted for the first time.

        Args:
            seq: The sequence.
            same_model: Its prompt tokens found in the cache that were first written for its own model.
        """
        self.admitted += 1
        self.prompt_tokens += seq.prompt_len
        self.cached_tokens_same_model += same_model
        self.cached_tokens_cross_model += (seq.cached_tokens or 0) - same_model
