"""The floor that decode steps are held against."""

import dataclasses

import jax
import tiny
from harness import SMALL, make_engine

from icarus_jax.bench import step


def test_the_floor_counts_what_a_step_must_read(tmp_path):
    folder = tiny.tiny_model("llama", tmp_path / "model")
    heads = {name: (tiny.tiny_adapter(folder, tmp_path, seed=i), "shared") for i, name in enumerate("abcd")}
    engine = make_engine(folder, heads, dataclasses.replace(SMALL, max_num_seqs=4))
    trunk, *names = engine.models
    model = engine.model_config
    weights, adapters = (sum(x.nbytes for x in jax.tree.leaves(part)) for part in engine.runner.weights)
    token = 2 * 4 * model.num_layers * model.num_kv_heads * model.head_dim  # K and V, float32

    assert step.floor_bytes(engine, [trunk] * 3, 10) == weights + 30 * token
    one = step.floor_bytes(engine, names[:1], 10)
    assert one == weights + adapters // 4 + 10 * token  # the other three heads' are not read
    assert step.floor_bytes(engine, names[:1] * 3, 10) == one + 20 * token
    assert step.floor_bytes(engine, names, 10) == weights + adapters + 40 * token
