"""The mesh: where everything lies, the compiled programs' collectives, and the same tokens as on one device."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from icarus_jax.config import LORA_TARGETS, TARGETS, EngineConfig, ModelConfig
from icarus_jax.engine.buckets import make_buckets
from icarus_jax.engine.multihost import CALLS
from icarus_jax.engine.programs import Programs
from icarus_jax.engine.runner import Runner
from icarus_jax.models import sharding
from icarus_jax.models.attention import append_and_attend
from icarus_jax.models.block import PROJECTIONS
from icarus_jax.models.head_bank import HeadBank
from icarus_jax.models.products import MeshLinear
from icarus_jax.models.sharding import KV_PAGES_AXES, make_mesh_layout
from icarus_jax.models.trunk import Trunk, place_weights
from icarus_jax.weights.checkpoint import load_trunk, open_trunk, save_orbax
from icarus_jax.weights.params import param_shapes
from pallas_kernels.paged_attention import SequenceRows, WorkShape, build_work, paged_attention
from tests import tiny
from tests.engine.harness import SMALL, drain, generate, make_engine, submit
from tests.weights import measure_loading

ROOT = Path(__file__).resolve().parents[2]
LLAMA_70B = ModelConfig("llama", 128256, 8192, 28672, 80, 64, 8, 128)
SMOLLM2 = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True)
QWEN = ModelConfig("qwen2", 151936, 896, 4864, 24, 14, 2, 64, qkv_bias=True, qk_norm=True)
ODD = ModelConfig("llama", 321, 48, 81, 2, 6, 3, 8)
BOTH = ("model", "page")


def layout_of(model: ModelConfig, mesh: str, page_size: int = 64):
    return make_mesh_layout(EngineConfig(mesh=mesh, page_size=page_size), model.num_kv_heads)


def specs(model: ModelConfig, mesh: str) -> dict[str, P]:
    layout = layout_of(model, mesh)
    return {name: layout.param(name, shape).spec for name, shape in param_shapes(model).items()}


@pytest.mark.parametrize("mesh", ["1x8", "2x4"])
def test_a_product_of_the_parts_is_that_of_the_whole(mesh):
    """The GPU's kernel on each device: weights that are split by din, by dout and by both."""
    layout, rng = layout_of(ODD, mesh), np.random.default_rng(0)
    for name in PROJECTIONS:
        shape = param_shapes(ODD)[name]
        x = rng.standard_normal((4, shape[1])).astype(np.float32)
        w = rng.standard_normal(shape).astype(np.float32)
        placed = jax.device_put(w, layout.param(name, shape))
        got = jax.jit(functools.partial(MeshLinear(layout, "gpu"), name))(x, placed, np.int32(1))
        np.testing.assert_allclose(got, np.tensordot(x, w[1], 1), atol=1e-4, err_msg=name)


def test_where_the_weights_lie():
    """K=8 on eight devices: a KV head on each, and the rest of a layer in the classic column and row split."""
    assert specs(LLAMA_70B, "1x8") == {
        "embed": P(BOTH, None),
        "lm_head": P(BOTH, None),
        "final_norm": P(None),
        "attn_norm": P(None, None),
        "mlp_norm": P(None, None),
        "qkv": P(None, ("page",), ("model",), None, None),
        "o": P(None, BOTH, None),
        "gate_up": P(None, None, None, BOTH),
        "down": P(None, BOTH, None),
    }
    assert dict(layout_of(LLAMA_70B, "1x8").mesh.shape) == {"data": 1, "model": 8, "page": 1}
    assert dict(layout_of(LLAMA_70B, "4x2").mesh.shape) == {"data": 4, "model": 2, "page": 1}
    assert dict(layout_of(SMOLLM2, "1x8").mesh.shape) == {"data": 1, "model": 1, "page": 8}
    assert dict(layout_of(QWEN, "2x4").mesh.shape) == {"data": 2, "model": 2, "page": 2}
    more = specs(QWEN, "2x4")
    assert (more["qkv_bias"], more["q_norm"], more["k_norm"]) == (P(None, ("model",), None, None), *[P(None, None)] * 2)


@pytest.mark.parametrize("model", [LLAMA_70B, SMOLLM2, QWEN])
@pytest.mark.parametrize("mesh", ["1x8", "2x4", "4x2"])
def test_every_matrix_is_split_over_the_whole_model_axis(model, mesh):
    layout = layout_of(model, mesh)
    parts = int(mesh[-1])
    for name, shape in param_shapes(model).items():
        part = layout.param(name, shape).shard_shape(shape)
        vector = "norm" in name or "bias" in name
        assert math.prod(part) * parts == math.prod(shape) or vector, name


def test_what_does_not_divide_is_replicated_by_rule():
    """V=321 and F=81 on a mesh whose axes are 3 x 2 of six devices: `model` (3) divides them, `page` (2) does not."""
    layout = make_mesh_layout(EngineConfig(mesh="1x6", page_size=64), ODD.num_kv_heads)
    assert dict(layout.mesh.shape) == {"data": 1, "model": 3, "page": 2}
    assert layout.param("gate_up", (2, 48, 2, 81)).spec == P(None, None, None, ("model",))
    assert layout.param("lm_head", (321, 48)).spec == P(("model",), None)
    four = layout_of(ODD, "1x4")  # 1 x 4
    assert four.param("embed", (321, 48)).is_fully_replicated and four.param("down", (2, 81, 48)).is_fully_replicated
    assert four.param("o", (2, 48, 48)).shard_shape((2, 48, 48)) == (2, 12, 48)
    assert layout_of(ODD, "2x2").spec(("rows", "embed"), (7, 48)) == P(None, None)
    assert layout_of(ODD, "2x2").spec(("rows", "embed"), (8, 48)) == P(("data",), None)


@pytest.mark.parametrize("model", [SMOLLM2, QWEN, LLAMA_70B])
@pytest.mark.parametrize("mesh", ["1x8", "2x4", "4x2"])
def test_no_kv_is_stored_twice(model, mesh):
    shape = (2, 16, model.num_kv_heads, 64, 2 * model.head_dim)
    assert math.prod(layout_of(model, mesh).named(KV_PAGES_AXES, shape).shard_shape(shape)) * 8 == math.prod(shape)


def test_heads_are_split_like_their_projections():
    layout = layout_of(QWEN, "2x4")
    got = {}
    for target in TARGETS:
        din, dout = QWEN.target_shapes[target]
        got[target] = tuple(s.spec for s in layout.factors(target, (24, 4, 16, din), (24, 4, 16, dout)))
    whole, split = P(None, None, None, None), P(None, None, None, BOTH)
    column, row, queries = (whole, split), (split, whole), (whole, P(None, None, None, ("model",)))
    assert got == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), queries),
        **dict.fromkeys(("o_proj", "down_proj"), row),
        **dict.fromkeys(("gate_proj", "up_proj"), column),
    }


@pytest.mark.parametrize(
    "config, kv_heads, said",
    [
        ({"mesh": "1x16"}, 8, "needs 16 devices; there are 8"),
        ({"mesh": "8"}, 8, "DATAxMODEL"),
        ({"mesh": "0x8"}, 8, "DATAxMODEL"),
        ({"mesh": "1x8", "page_size": 12}, 3, "8 devices share .* multiple of 8, for example 64"),
        ({"mesh": "2x4", "page_size": 70}, 2, "4 devices share .* multiple of 4, for example 72"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(config, kv_heads, said):
    with pytest.raises(ValueError, match=said) as error:
        make_mesh_layout(EngineConfig(**config), kv_heads)
    assert "\n" not in str(error.value)


# ---- loading


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every format: Hugging Face (with biases, with norms), GGUF in blocks of 32 with q and k permuted, Orbax."""
    path = tmp_path_factory.mktemp("formats")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16, "num_attention_heads": 8}
    llama = tiny.tiny_model("llama", path, **sizes)
    quantised = lambda name: gguf.GGMLQuantizationType["Q8_0" if "proj" in name else "F32"]  # noqa: E731
    save_orbax(load_trunk(llama), str(path / "orbax"))
    return {
        "llama": llama,
        "qwen2": tiny.tiny_model("qwen2", path, tie_word_embeddings=True),
        "qwen3": tiny.tiny_model("qwen3", path),
        "gguf": tiny.write_gguf(llama, path / "model.gguf", quantised),
        "orbax": str(path / "orbax"),
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gguf", "orbax"])
@pytest.mark.parametrize("mesh", ["1x8", "2x4"])
def test_shards_are_the_weights(folders, name, mesh):
    whole, trunk = load_trunk(folders[name]), open_trunk(folders[name])
    layout = layout_of(trunk.config, mesh)
    placed = layout.place_params(trunk.params, "float32")
    assert placed.keys() == whole.params.keys()
    for param, values in whole.params.items():
        assert placed[param].sharding == layout.param(param, values.shape)
        np.testing.assert_array_equal(np.asarray(placed[param]), values, err_msg=param)
    assert trunk.identity == whole.identity


@pytest.mark.full
def test_a_host_never_holds_the_model(tmp_path):
    """A 70B-shaped model of two layers, scaled down: loading takes less than twice one of eight shards.

    The second measurement is of jax.make_array_from_callback, which holds the parts of all devices: it fails.
    """
    measure_loading.write_model(tmp_path)
    shard_by_shard, all_at_once = (measure_loading.measure(tmp_path, how) for how in ("place", "callback"))
    assert shard_by_shard < 2 < all_at_once


# ---- the compiled program


def programs(model: ModelConfig, config: EngineConfig, adapt_writers: bool) -> Programs:
    layout = make_mesh_layout(config, model.num_kv_heads)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in param_shapes(model).items()}
    trunk = Trunk(model, place_weights(zeros, layout, config))
    bank = layout.place_bank(HeadBank(model, "float32", 2, 4, TARGETS))
    return Programs(trunk, bank, config, adapt_writers, layout)


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
# In a layer: `o` and `down` (with their adapters), q, k, v if their inputs are split, and the merge of token shards
# (a gather of log-sum-exps, a sum); outside: the embedding, and the gather of the sampled rows where rows are split.
# Where rows are split they are gathered for attention: q, k and v.
EXPECTED = {
    ("1x8", 8): {"all-reduce": 3},
    ("1x8", 3): {"all-reduce": 5, "all-gather": 1},
    ("2x4", 2): {"all-reduce": 6, "all-gather": 4},
}


@pytest.mark.parametrize("mesh, kv_heads", EXPECTED)
@pytest.mark.parametrize("adapt_writers", [False, True])
def test_the_decode_program(mesh, kv_heads, adapt_writers):
    model = ModelConfig("llama", 320, 64, 128, 2, 2 * kv_heads, kv_heads, 8)
    config = dataclasses.replace(SMALL, page_size=8, num_pages=4096, max_num_seqs=4, mesh=mesh)
    made = programs(model, config, adapt_writers)
    bucket = [b for b in make_buckets(config, True) if b.writers == b.logits and b.readers][-1]
    compiled = made.lower(bucket).compile()
    text = compiled.as_text()
    assert Counter(kind for _, kind in COLLECTIVE.findall(text)) == EXPECTED[mesh, kv_heads]
    pool = made.kv_pages.sharding.shard_shape(made.kv_pages.shape)
    assert compiled.memory_analysis().temp_size_in_bytes < math.prod(pool) * 4 / 8
    assert f"f32[{','.join(map(str, pool))}]" in text  # the pool's shape, on one device ...
    assert not re.search(rf"= f32\[{','.join(map(str, pool))}\]\S* copy\(", text)  # ... is never copied


@pytest.mark.parametrize("mesh, projections", [("1x1", 5), ("1x8", 0)])  # four in a layer, and the logits
def test_on_one_cpu_the_kernels_serve(mesh, projections):
    config = dataclasses.replace(SMALL, page_size=8, max_num_seqs=4, mesh=mesh)
    made = programs(ModelConfig("llama", 320, 64, 128, 2, 16, 8, 8), config, False)
    bucket = [b for b in make_buckets(config, True) if b.writers == b.logits and b.readers][-1]
    lowered = made.lower(bucket)
    text = lowered.as_text()
    assert text.count("custom_call @icarus_linear") == projections
    assert text.count("custom_call @icarus_paged_attention") == 1
    if mesh == "1x1":
        assert text.count("custom_call @icarus_lora") == len(LORA_TARGETS)
        shapes = [leaf.shape for leaf in jax.tree.leaves(made.weights[0]) if leaf.ndim == 4]
        text = lowered.compile().as_text()
        for shape in shapes:
            panels = rf"f32\[{','.join(map(str, shape))}\]"
            assert re.search(panels, text) and not re.search(rf"= {panels}\S* (copy|transpose|fusion)\(", text)
        assert len(shapes) == projections


# ---- attention


@pytest.mark.parametrize("kv_heads, mesh", [(3, "2x4"), (2, "1x8")])
def test_shards_of_a_page_merge_to_the_oracle(kv_heads, mesh):
    """A chunk of a prefill and a decode row; what nobody owns is NaN."""
    size, dim, rng = 8, 8, np.random.default_rng(0)
    tables, ends, counts = [[3, 1, 5], [7, 2]], [19, 10], [5, 1]
    kv = np.full((2, 12, kv_heads, size, 2 * dim), np.nan, np.float32)
    rows, slots, first = [], np.full(7, -1, np.int32), 0
    for table, end, count in zip(tables, ends, counts, strict=True):
        positions = np.arange(end - count, end)
        for at in range(end - count):  # what was there before
            kv[1, table[at // size], :, at % size] = rng.standard_normal((kv_heads, 2 * dim))
        slots[first : first + count] = np.array(table)[positions // size] * size + positions % size
        rows.append(SequenceRows(np.arange(first, first + count), positions, table))
        first += count
    q, k, v = (rng.standard_normal((8, n, dim)).astype(np.float32) for n in (2 * kv_heads, kv_heads, kv_heads))
    work = build_work(rows, WorkShape(8, 2, 16, 4, 4), size)
    want_kv = kv.copy()
    for t in range(first):
        want_kv[1, slots[t] // size, :, slots[t] % size] = np.concatenate([k[t], v[t]], -1)
    scale = dim**-0.5
    want = paged_attention(q, want_kv, np.int32(1), work, scale=scale, implementation="reference")
    layout = layout_of(dataclasses.replace(SMOLLM2, num_kv_heads=kv_heads, num_heads=kv_heads), mesh, size)
    op = functools.partial(append_and_attend, layout, scale=scale, implementation="xla")
    pages = jax.device_put(kv, layout.named(KV_PAGES_AXES, kv.shape))
    got, got_kv = jax.jit(op)(pages, np.int32(1), q, k, v, slots, work)
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)
    np.testing.assert_array_equal(got_kv, want_kv)


# ---- the engine


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """K -> (checkpoint, heads, what one device generates)."""
    made = {}

    def get(kv_heads: int):
        if kv_heads not in made:
            path = tmp_path_factory.mktemp(f"k{kv_heads}")
            sizes = {"num_key_value_heads": kv_heads, "num_attention_heads": 2 * kv_heads, "intermediate_size": 96}
            folder = tiny.tiny_model("llama", path, num_hidden_layers=2, **sizes)
            everything = (*tiny.ALL_TARGETS, "k_proj", "v_proj")
            heads = {
                "a": (tiny.tiny_adapter(folder, path, seed=1), "shared"),
                "x": (tiny.tiny_adapter(folder, path, seed=2, targets=everything), "isolated"),
            }
            trunk = load_trunk(folder)
            made[kv_heads] = (trunk, heads, conversation(trunk, heads, "1x1"))
        return made[kv_heads]

    return get


def conversation(trunk, heads, mesh: str) -> list[list[int]]:
    """The trunk and both heads on one prompt in chunks, then on prompts that the cache knows, generated tokens too."""
    config = dataclasses.replace(SMALL, page_size=8, num_pages=32, max_num_seqs=3, mesh=mesh)
    engine = make_engine(trunk, heads, config)
    runner = engine.runner
    runner.buckets = [b for b in runner.buckets if b.writers in (3, 32) and b.readers == 3]  # two programs, not ten
    assert not runner.kv_pages.sharding.is_fully_replicated or mesh == "1x1"
    prompt = np.random.default_rng(3).integers(0, 256, 45).tolist()
    results = [submit(engine, model, prompt, max_tokens=8)[0] for model in ("trunk", *heads)]
    drain(engine)
    more = {"a": results[0].token_ids, "trunk": [9], "x": [1, 2, 3]}
    results += [submit(engine, model, prompt + text, max_tokens=5)[0] for model, text in more.items()]
    drain(engine)
    assert results[0].cached_tokens == 0 and results[3].cached_tokens == 52  # what the trunk wrote and generated
    assert results[5].cached_tokens >= 40
    assert len({tuple(r.token_ids) for r in results}) == len(results)  # the models do differ
    return [result.token_ids for result in results]


def test_weights_in_an_order_of_their_own_say_the_same(one_device, monkeypatch):
    """A TPU's orders of a weight's dimensions in memory, on CPU devices; eight share F=96, which fills no tiles."""
    monkeypatch.setitem(sharding.ORDERS, "cpu", sharding.ORDERS["tpu"])
    trunk, heads, want = one_device(3)
    layout = layout_of(trunk.config, "1x8")
    for name, placed in layout.place_params(trunk.params, "float32").items():
        np.testing.assert_array_equal(np.asarray(placed), trunk.params[name], err_msg=name)
        order = {"qkv": (0, 2, 3, 4, 1), "gate_up": (0, 2, 3, 1)}.get(name, tuple(range(placed.ndim)))
        assert placed.format.layout.major_to_minor == order, name
    assert layout_of(LLAMA_70B, "1x8").held("gate_up", (80, 8192, 2, 28672)).layout.major_to_minor == (0, 2, 1, 3)
    assert conversation(trunk, heads, "1x8") == want


@pytest.mark.parametrize(
    "kv_heads, mesh", [(3, "1x8"), (3, "2x4"), (3, "4x2"), (2, "1x8"), (2, "2x4"), (8, "1x8"), (8, "4x2")]
)
def test_a_mesh_says_what_one_device_says(one_device, kv_heads, mesh):
    trunk, heads, want = one_device(kv_heads)
    assert conversation(trunk, heads, mesh) == want


# ---- several processes


def test_what_runs_programs_runs_in_every_process():
    """A new method of the Runner is either one of CALLS or has to be named here."""
    # `results` only waits; `recover` gives up on several hosts; each process closes its own runner;
    # a page store is refused on several hosts.
    waiting = {"results", "recover", "close", "read_pages", "write_pages"}
    on_the_host_alone = {"prepare", "num_active", "fit_head", "temporary_bytes", *waiting}
    methods = {name for name, value in vars(Runner).items() if callable(value) and not name.startswith("_")}
    assert methods == on_the_host_alone | set(CALLS)


@pytest.mark.full
@pytest.mark.timeout(1000)
def test_two_processes_say_what_one_says(tmp_path):
    """launch/generate.py on 2 x 2 devices of two processes, which talk over gloo; process 0 answers."""
    folder = tiny.tiny_model("llama", tmp_path, num_hidden_layers=2)
    head = tiny.tiny_adapter(folder, tmp_path, seed=1)
    config = EngineConfig(page_size=4, num_pages=32, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=64)
    prompt = np.random.default_rng(6).integers(0, 256, 21).tolist()
    one = make_engine(folder, {"a": (head, "shared")}, config, eos_ids=[258])
    want = [generate(one, model, prompt, max_tokens=10).token_ids for model in ("trunk", "a")]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = {**dataclasses.asdict(config), "mesh": "2x2"}
    arguments = [
        "--config=single.py",
        f"--config.trunk.source={folder}",
        f"--heads=a={head}",
        *(f"--config.engine.{key}={engine[key]}" for key in ("mesh", *changed(config))),
        f"--config.distributed.coordinator=127.0.0.1:{port}",
        "--config.distributed.num_processes=2",
        f"--prompt_ids={','.join(map(str, prompt))}",
        "--max_tokens=10",
        "--json",
    ]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "ICARUS_CACHE": str(tmp_path / "cache"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "generate.py"), *arguments, f"--config.distributed.process_id={i}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    answer = json.loads(outputs[0][0].splitlines()[-1])
    assert [model["token_ids"] for model in answer["models"]] == want
    assert answer["models"][1]["cached_tokens"] == len(prompt)
    assert not outputs[1][0].strip().startswith("{")  # process 1 answers nobody


def changed(config: EngineConfig) -> list[str]:
    """The fields that are not at their defaults."""
    return [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
