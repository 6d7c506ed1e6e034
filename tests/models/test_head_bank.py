"""The head bank: loading slots, and its share of the rows."""

from __future__ import annotations

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icarus_jax.config import LORA_TARGETS, TARGETS, EngineConfig, ModelConfig
from icarus_jax.models.block import BLOCK_PARAMS, Block
from icarus_jax.models.head_bank import HeadBank, LayerBank, fit_factors, load_slot
from icarus_jax.models.layers import rope_tables
from icarus_jax.models.products import MeshLinear
from icarus_jax.models.sharding import make_mesh_layout
from icarus_jax.weights.params import param_shapes

CONFIG = ModelConfig("llama", 64, 24, 40, 3, 4, 2, 8)
RANK = 4


def factors(seed: int, rank: int = RANK, targets=LORA_TARGETS):
    rng = np.random.default_rng(seed)
    shapes = {t: CONFIG.target_shapes[t] for t in targets}
    draw = lambda *shape: rng.standard_normal((CONFIG.num_layers, *shape)).astype(np.float32)  # noqa: E731
    return {t: (draw(din, rank), draw(rank, dout)) for t, (din, dout) in shapes.items()}


def new_bank(targets=LORA_TARGETS, slots: int = 3) -> HeadBank:
    return HeadBank(CONFIG, "float32", slots, RANK, targets)


def load(bank: HeadBank, slot: int, weights) -> None:
    load_slot(bank, np.int32(slot), fit_factors(CONFIG, weights, RANK, bank.targets))


@pytest.mark.parametrize("mesh", ["1x1", "1x4", "2x2"])
@pytest.mark.parametrize("first", [0, 2, 5])
def test_each_row_gets_its_own_heads_share(first, mesh):
    layout = make_mesh_layout(EngineConfig(mesh=mesh), CONFIG.num_kv_heads)
    bank, heads = new_bank(), {1: factors(1), 3: factors(3, rank=2)}
    for slot, weights in heads.items():
        load(bank, slot, weights)
    bank = layout.place_bank(bank)
    rng = np.random.default_rng(0)
    slots, active = np.array([1, 0, 3, 1, 0], np.int32), np.array([3, 1], np.int32)
    for target in LORA_TARGETS:
        din, dout = CONFIG.target_shapes[target]
        x, out = (rng.standard_normal((5, n)).astype(np.float32) for n in (din, dout))
        got = LayerBank(bank, 2, active, "xla", layout).add(target, out, x, slots, first)
        want = out.copy()
        for row in range(first, 5):
            if slots[row]:
                a, b = heads[slots[row]][target]
                want[row] += x[row] @ a[2] @ b[2]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mesh, targets, alone",
    [
        ("1x1", TARGETS, 0),
        ("2x2", LORA_TARGETS, 0),
        ("1x4", TARGETS, 3),  # the inputs of q, k and v are split over devices, those of their adapters are not
        ("1x2", ("up_proj", "o_proj"), 1),  # up without gate: not the first columns of their product
    ],
)
def test_a_block_adds_each_heads_share(mesh, targets, alone):
    """With the kernels for GPUs, whose products add it themselves where the mesh lets them, and without."""
    layout = make_mesh_layout(EngineConfig(mesh=mesh), CONFIG.num_kv_heads)
    weights = {name: shape for name, shape in param_shapes(CONFIG).items() if name in BLOCK_PARAMS}
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) / 5 for name, shape in weights.items()}
    stack = Block(layout.place_params(weights, "float32"))
    bank = new_bank(targets)
    for slot in (1, 3):
        load(bank, slot, factors(slot, targets=targets))
    bank = layout.place_bank(bank)
    x = rng.standard_normal((8, CONFIG.hidden_size)).astype(np.float32)
    slots, active = np.array([0, 0, 1, 0, 3, 1, 3, 0], np.int32), np.array([3, 1, 0], np.int32)
    tables = rope_tables(CONFIG, jnp.arange(8))

    @functools.partial(jax.jit, static_argnums=0)
    def run(kernels):
        block = stack.at(jnp.int32(2), MeshLinear(layout, kernels))
        adapters = LayerBank(bank, jnp.int32(2), active, kernels, layout)
        made = block.attention_inputs(CONFIG, adapters, x, slots, 0, tables)
        attended = block.attention_output(CONFIG, adapters, made[0], slots, 0)
        return *made, attended, block.mlp(CONFIG, adapters, x, slots, 0)

    for got, want in zip(run("gpu"), run("xla"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    kinds = Counter(re.findall(r"name=(lora_\w+|linear)", str(jax.make_jaxpr(lambda: run("gpu"))())))
    assert (kinds["linear"], kinds["lora_up"]) == (4, alone)


def test_loading_replaces_one_slot_and_compiles_once():
    bank = new_bank()
    graph, state = nnx.split(bank)
    traces = []

    def put(state, slot, weights):
        traces.append(slot)
        merged = nnx.merge(graph, state)
        load_slot(merged, slot, weights)
        return nnx.state(merged)

    put = jax.jit(put, donate_argnums=0)
    for slot, weights in ((1, factors(1)), (2, factors(2)), (3, factors(3)), (2, factors(4, rank=1))):
        old = state
        state = put(state, np.int32(slot), fit_factors(CONFIG, weights, RANK, bank.targets))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert len(traces) == 1
    analysis = put.lower(state, np.int32(1), fit_factors(CONFIG, factors(1), RANK, bank.targets)).compile()
    assert analysis.memory_analysis().alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    held = nnx.merge(graph, state).up_proj
    for slot, (seed, rank) in {1: (1, RANK), 2: (4, 1), 3: (3, RANK)}.items():
        a, b = factors(seed, rank)["up_proj"]
        np.testing.assert_array_equal(held.a[...][:, slot - 1, :rank], a.swapaxes(1, 2))
        np.testing.assert_array_equal(held.b[...][:, slot - 1, :rank], b)
        assert not np.asarray(held.a[...][:, slot - 1, rank:]).any()


def test_a_bank_has_the_targets_it_was_made_for():
    assert new_bank().k_proj is None
    assert new_bank(TARGETS).k_proj.b[...].shape == (3, 3, RANK, 16)


def test_what_does_not_fit_is_refused():
    fit = lambda weights: fit_factors(CONFIG, weights, RANK, LORA_TARGETS)  # noqa: E731
    with pytest.raises(ValueError, match=r"rank is 5, the adapter slots hold 4: .*max_lora_rank=5"):
        fit(factors(0, rank=5))
    with pytest.raises(ValueError, match="it changes k_proj; the adapter slots hold q_proj, o_proj"):
        fit(factors(0, targets=("q_proj", "k_proj")))
    with pytest.raises(ValueError, match="its q_proj has shapes"):
        fit({"q_proj": factors(0)["up_proj"]})
    broken = factors(0)
    broken["o_proj"][1][1, 2, 3] = np.inf
    with pytest.raises(ValueError, match="o_proj holds values that are not finite"):
        fit(broken)
