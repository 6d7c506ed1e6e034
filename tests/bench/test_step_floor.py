"""The floor that decode steps are held against."""

import dataclasses

import jax

from icarus_jax.bench import floor
from tests import tiny
from tests.engine.harness import SMALL, make_engine


def test_the_floor_counts_what_a_step_must_read(tmp_path):
    folder = tiny.tiny_model("llama", tmp_path / "model")
    heads = {name: (tiny.tiny_adapter(folder, tmp_path, seed=i), "shared") for i, name in enumerate("abcd")}
    engine = make_engine(folder, heads, dataclasses.replace(SMALL, max_num_seqs=4))
    trunk, *names = engine.models
    model = engine.model_config
    weights, adapters = (sum(x.nbytes for x in jax.tree.leaves(part)) for part in engine.runner.weights)
    weights -= model.vocab_size * model.hidden_size * 4  # of the table of embeddings, only a row for each token is read
    token = 2 * 4 * model.num_layers * model.num_kv_heads * model.head_dim  # K and V, float32

    assert floor.floor_bytes(engine, [trunk] * 3, 10) == weights + 30 * token
    one = floor.floor_bytes(engine, names[:1], 10)
    assert one == weights + adapters // 4 + 10 * token  # the other three heads' are not read
    assert floor.floor_bytes(engine, names[:1] * 3, 10) == one + 20 * token
    assert floor.floor_bytes(engine, names, 10) == weights + adapters + 40 * token


def test_the_bandwidth_is_that_of_the_memory_that_the_engine_reads(monkeypatch):
    asked = []

    def reads(name, num_bytes):
        return lambda size: lambda: asked.append(name) or num_bytes

    monkeypatch.setattr(floor, "_cores_read", reads("cores", 1))
    monkeypatch.setattr(floor, "_device_reads", reads("device", 1))
    floor.read_bandwidth(1 << 20, 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # its floor was the host's memory's, on an H100
    floor.read_bandwidth(1 << 20, 2)
    assert asked == 3 * ["cores"] + 3 * ["device"]


def test_both_ways_of_reading_read_as_many_bytes_as_they_say(monkeypatch):
    read = []
    spy = lambda x: read.append(x.nbytes)  # noqa: E731
    monkeypatch.setattr(floor.np, "max", spy)
    assert floor._cores_read(1 << 20)() == sum(read) == 1 << 20
    read.clear()
    monkeypatch.setattr(jax, "jit", lambda function: function)
    monkeypatch.setattr(jax.numpy, "max", spy)
    assert floor._device_reads(1 << 20, 4)() == sum(read) == 4 << 20
