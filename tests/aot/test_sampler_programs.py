"""The sampler's programs for an H100: nothing waits for the host, and the logits are read few times."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from icarus_jax.aot.hlo_text import memory_traffic
from icarus_jax.engine.sample_inputs import VARIANTS, mask_shape, packed_width, unpack
from icarus_jax.engine.sampler import sample
from tests.pallas_kernels import aot_gpu

S, V, C = 256, 128_256, 2048
PASSES = 10  # readings that find a threshold
# How often an array of the logits' size may be read or written: outside the loops, and in one turn of all of them.
# There are two, for top-k and top-p. A penalty makes two arrays of counts, whose making is counted generously.
MOST = {
    "greedy": (2.1, 0),
    "random": (3.1, 0),
    "filtered": (10.2, 2.2),
    "greedy_logprobs": (8.2, 0),
    "filtered_logprobs": (17.2, 2.2),
    "greedy_masked": (4.2, 0),
    "greedy_changed": (36.5, 0),
    "everything": (36.5, 2.2),
}


@pytest.mark.skipif(not aot_gpu.can_compile(), reason=aot_gpu.NEEDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_the_logits_few_times(variant):
    logits = jax.ShapeDtypeStruct((S, V), jnp.float32)
    packed = jax.ShapeDtypeStruct((S, packed_width(C, variant)), jnp.int32)
    masks = jax.ShapeDtypeStruct(mask_shape(S, V, variant), jnp.int32)
    picked = lambda y, x, m: sample(y, unpack(x, variant), None, m, variant=variant)  # noqa: E731
    program = aot_gpu.compile_h100(picked, logits, packed, masks)
    text = program.as_text()
    assert " conditional(" not in text
    assert " sort(" not in text  # XLA's is many times slower than all the rest
    loops = [line for line in text.splitlines() if " while(" in line]
    turns = [re.findall(r'"known_trip_count":\{"n":"(\d+)"', line) for line in loops]
    assert turns == [[str(PASSES)]] * (2 if "filtered" in VARIANTS[variant] else 0)
    outside, turn = (count / (4 * S * V) for count in memory_traffic(text))
    most_outside, most_turn = MOST[variant]
    assert outside <= most_outside and turn <= most_turn
