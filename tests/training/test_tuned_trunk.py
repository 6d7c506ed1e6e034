"""A trunk tuned together with its heads: the loss and its gradient, the saved result, and what it is served as."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from icarus_jax.config import LORA_TARGETS, TARGETS
from icarus_jax.training.heads import Method, TrunkLora, init_heads, init_tuning, joined, stacked, trained_before
from icarus_jax.training.step import Optimiser, Tuning, init_state, train_step, validate
from icarus_jax.training.two_stream import drift, token_logprobs
from icarus_jax.weights.checkpoint import load_trunk, open_trunk
from icarus_jax.weights.peft import Adapter, load_adapter, save_adapter
from tests import tiny
from tests.models import oracle
from tests.training.test_step import PREFIX, make_examples, packed, params_of, random_heads

METHOD = Method("shared", targets=LORA_TARGETS, rank=4, scale=2.0)
LORA = TrunkLora(TARGETS, rank=3, scale=1.5)
TUNING = Tuning(LORA, Optimiser(steps=30, lr=1e-2), kl=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.tiny_model("qwen3", tmp_path_factory.mktemp("trunk"), qkv_bias=True)


@pytest.fixture(scope="module")
def trunk(folder):
    return load_trunk(folder)


def random_tuning(trunk, seed=5):
    """A trunk's LoRA whose B is not zero."""
    rng = np.random.default_rng(seed)
    made = init_tuning(trunk.config, LORA, seed)
    return {t: (a, jnp.asarray(rng.normal(0, 0.05, b.shape), jnp.float32)) for t, (a, b) in made.items()}


def save(trunk, tuning, path):
    """Saves a trunk's LoRA as a PEFT folder."""
    weights = {t: (np.asarray(a[0]), np.asarray(b[0]) * LORA.scale) for t, (a, b) in tuning.items()}
    adapter = Adapter("trunk", LORA.rank, weights, "isolated", trunk.identity)
    save_adapter(str(path), adapter, base_model_name="tiny", alpha=LORA.scale * LORA.rank)
    return str(path)


@pytest.mark.parametrize("family, targets", [("qwen2", TARGETS), ("gpt_oss", ("q_proj", "k_proj", "v_proj", "o_proj"))])
def test_a_merged_lora_is_pefts(family, targets, tmp_path):
    """Of families whose projections have biases, which it leaves as they are."""
    folder = tiny.tiny_model(family, tmp_path)
    path, tokens = tiny.tiny_adapter(folder, tmp_path, targets), np.arange(40, 60)
    with torch.no_grad():
        want = tiny.hf_model(folder, path)(torch.tensor(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(oracle.logits(load_trunk(folder, adapter=path), tokens), want, rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_heads_on_the_merged_trunk(trunk, folder, tmp_path):
    heads, tuning = random_heads(trunk, METHOD, count=2), random_tuning(trunk)
    examples = make_examples(4) + make_examples(3, seed=1, slot=2)
    batches, prefix = packed(examples), jnp.asarray(PREFIX)
    tuned, _ = validate(trunk.config, METHOD, heads, params_of(trunk), prefix, batches, trunk=tuning, tuning=TUNING)
    whole = load_trunk(folder, adapter=save(trunk, tuning, tmp_path / "trunk"))
    served, _ = validate(trunk.config, METHOD, heads, params_of(whole), prefix, batches)
    np.testing.assert_allclose(tuned, served, rtol=1e-4)
    frozen, _ = validate(trunk.config, METHOD, heads, params_of(trunk), prefix, batches)
    assert not np.allclose(frozen, tuned, rtol=1e-3)


def test_the_merged_trunk_is_pefts(trunk, folder, tmp_path):
    import torch

    path = save(trunk, random_tuning(trunk), tmp_path / "trunk")
    tokens = torch.arange(40, 60)[None]
    with torch.no_grad():
        want = tiny.hf_model(folder, path)(tokens).logits[0].numpy()
    got = oracle.logits(load_trunk(folder, adapter=path), np.arange(40, 60))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_parts_of_a_merged_parameter_are_cut_from_the_whole(trunk, folder, tmp_path):
    merged = open_trunk(folder, adapter=save(trunk, random_tuning(trunk), tmp_path / "trunk"))
    for param in merged.params.values():
        whole = param[(slice(None),) * len(param.shape)]
        assert whole.shape == param.shape
        index = (slice(1, None), *(slice(None) for _ in param.shape[1:]))
        np.testing.assert_array_equal(param[index], whole[index])
    qkv = merged.params["qkv"]
    index = (slice(None), slice(8, 24), slice(1, 2), slice(None), slice(None))
    np.testing.assert_array_equal(qkv[index], qkv[(slice(None),) * 5][index])


def test_identities_differ_by_adapter_and_a_foreign_adapter_is_refused(trunk, folder, tmp_path):
    one, two = (save(trunk, random_tuning(trunk, seed), tmp_path / str(seed)) for seed in (1, 2))
    names = {open_trunk(folder, adapter=path).identity for path in (one, two, "")}
    assert len(names) == 3
    assert open_trunk(folder, "bfloat16", one).identity == open_trunk(folder, adapter=one).identity
    other = tiny.tiny_model("qwen3", tmp_path / "other", seed=9, qkv_bias=True)
    with pytest.raises(ValueError, match="was trained on the trunk"):
        open_trunk(other, adapter=one)


def test_the_trunks_gradient_is_the_finite_difference(trunk):
    """Along one random direction a factor; through the K/V that the heads read, and through the common prefix."""
    heads, tuning = random_heads(trunk, METHOD), random_tuning(trunk)
    (batch,) = packed(make_examples(1, seed=3), rows=1)
    params = params_of(trunk)

    @jax.jit
    def loss(tuning):
        bank = stacked(tuning, LORA.scale, jnp.float32)
        logprobs, _ = token_logprobs(trunk.config, METHOD, heads, params, jnp.asarray(PREFIX), batch, tuning=bank)
        return -jnp.where(batch.target_segments > 0, logprobs, 0).sum()

    grads = jax.grad(loss)(tuning)
    rng = np.random.default_rng(0)
    for target in TARGETS:
        for part in (0, 1):
            direction = jnp.asarray(rng.normal(size=tuning[target][part].shape), jnp.float32)
            moved = [
                tuning | {target: tuple(x + e * direction if i == part else x for i, x in enumerate(tuning[target]))}
                for e in (1e-2, -1e-2)
            ]
            want = float(loss(moved[0]) - loss(moved[1])) / 2e-2
            np.testing.assert_allclose(float((grads[target][part] * direction).sum()), want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("targets", [("k_proj", "v_proj"), ("q_proj",)])
def test_heads_keep_targets_that_the_trunks_lora_does_not_have(trunk, targets):
    heads = stacked(random_heads(trunk, METHOD, count=2), METHOD.scale, jnp.float32)
    tuning = stacked({t: random_tuning(trunk)[t] for t in targets}, LORA.scale, jnp.float32)
    both = joined(heads, tuning)
    assert both.keys() == heads.keys()
    for target, (a, b) in both.items():
        more = LORA.rank if target in targets else 0
        assert (a.shape[2], b.shape[2]) == (METHOD.rank + more,) * 2
        np.testing.assert_array_equal(a[:, :, : METHOD.rank], heads[target][0])
        np.testing.assert_array_equal(b[:, :, : METHOD.rank], heads[target][1])


def test_a_lora_of_another_trunk_is_not_gone_on_with(trunk, tmp_path, caplog):
    other = load_trunk(tiny.tiny_model("qwen3", tmp_path / "other", seed=9, qkv_bias=True))
    path = save(trunk, random_tuning(trunk), tmp_path / "trunk")
    again = trained_before(trunk, LORA, [path])
    for target, factors in random_tuning(trunk).items():
        for x, y in zip(factors, again[target], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
    with pytest.raises(ValueError, match="was trained on the trunk"):
        trained_before(other, LORA, [path])
    head = tiny.tiny_adapter(tiny.tiny_model("qwen3", tmp_path / "same", qkv_bias=True), tmp_path, LORA_TARGETS)
    rank = load_adapter(head, trunk.config).rank
    with pytest.raises(ValueError, match=r"trained with kv='isolated'.*trains with kv='shared'"):
        trained_before(other, dataclasses.replace(METHOD, rank=rank), [head])
    trained_before(other, dataclasses.replace(METHOD, kv="isolated", rank=rank), [head])
    assert "was trained on another trunk" in caplog.text


def test_drift_is_the_kl_of_the_logits_and_zero_without_an_adapter(trunk, folder, tmp_path):
    tuning, empty = random_tuning(trunk), np.zeros(0, np.int32)
    examples = make_examples(3, seed=4)
    (batch,) = packed(examples, rows=2, length=40, prefix=empty)
    params = params_of(trunk)
    far = drift(trunk.config, METHOD, stacked(tuning, LORA.scale, jnp.float32), params, batch)
    merged, total, count = load_trunk(folder, adapter=save(trunk, tuning, tmp_path / "trunk")), 0.0, 0
    for e in examples:
        p, q = (oracle.log_softmax(oracle.logits(one, e.tokens))[e.num_prompt - 1 : -1] for one in (trunk, merged))
        total, count = total + (np.exp(p) * (p - q)).sum(), count + len(p)
    np.testing.assert_allclose(far, total / count, rtol=1e-3)
    untrained = stacked(init_tuning(trunk.config, LORA, 0), LORA.scale, jnp.float32)
    assert abs(float(drift(trunk.config, METHOD, untrained, params, batch))) < 1e-6


def test_steps_lower_the_loss_more_than_heads_alone_and_kl_lowers_the_drift(trunk):
    batches = jax.tree.map(lambda x: np.stack([x]), packed(make_examples(6), rows=6)[0])
    text = packed(make_examples(4, seed=8), rows=4, prefix=np.zeros(0, np.int32), length=24)[0]
    params = params_of(trunk)

    def train(tuning, texts):
        lora = init_tuning(trunk.config, LORA, 1) if tuning else None
        state = init_state(init_heads(trunk.config, METHOD, params, [0]), TUNING.optimiser, lora, tuning)
        for _ in range(30):
            state, metrics = train_step(
                trunk.config,
                METHOD,
                TUNING.optimiser,
                state,
                params,
                jnp.asarray(PREFIX),
                batches,
                jnp.uint32(0),
                tuning,
                texts,
            )
        far = 0.0
        if tuning:
            far = drift(trunk.config, METHOD, stacked(state.trunk, LORA.scale, jnp.float32), params, text)
        return float(metrics.loss[0]), float(far)

    (alone, _), (free, moved), (held, near) = train(None, None), train(TUNING, None), train(TUNING, text)
    assert free < 0.7 * alone
    assert near < 0.5 * moved
    assert held < alone


@pytest.mark.full
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])  # experts take no adapters
def test_a_run_saves_a_trunk_that_its_heads_are_served_on(tmp_path, family):
    from configs.train import get_config
    from icarus_jax.training import loop
    from icarus_jax.weights.peft import load_adapter

    folder = tiny.tiny_model(family, tmp_path)
    rows = [{"prompt": f"{i} plus", "completion": f" {i + 1}"} for i in range(40)]
    for name in ("a", "text"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = get_config("a,b")
    config.trunk.source = folder
    config.trunk.tune, config.trunk.text = True, str(tmp_path / "text.jsonl")
    config.data.path = f"{tmp_path}/a.jsonl,{tmp_path}/a.jsonl"
    config.data.rows, config.trunk.text_rows, config.data.length = 8, 8, 32
    config.optimiser.steps, config.train.validate_every = 4, 2
    config.output = str(tmp_path / "run")
    tuned, *heads = loop.run(config)
    trunk = load_trunk(folder, adapter=str(tuned))
    assert trunk.identity != load_trunk(folder).identity
    for head in heads:
        load_adapter(str(head), trunk.config).check("shared", trunk.identity)
        with pytest.raises(ValueError, match="was trained on the trunk"):
            load_adapter(str(head), trunk.config).check("shared", load_trunk(folder).identity)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("trunk/drift", 0) > 0 for line in lines)
    with pytest.raises(ValueError, match="tuned"):
        config.trunk.tune = False
        loop.run(config)

    # Another run goes on from the trunk and the heads: before its first step they are as good as they were.
    config.trunk.tune, config.trunk.adapter, config.head.init = True, str(tuned), ",".join(map(str, heads))
    config.output, config.optimiser.steps = str(tmp_path / "more"), 2
    loop.run(config)
    rows = [json.loads(line) for line in (tmp_path / "more" / "metrics.jsonl").read_text().splitlines()]
    for name in ("a", "b"):
        last = [line[f"{name}/val_loss"] for line in lines if f"{name}/val_loss" in line][-1]
        assert rows[0][f"{name}/val_loss"] == pytest.approx(last, rel=1e-4)
