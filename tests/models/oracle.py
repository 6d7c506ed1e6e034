"""An independent two-stream oracle in NumPy, float64: the paper's equations, with no cache, no pages and no rows.

The trunk runs over the whole text and yields K and V of every layer; then the head runs over the same text with its
adapted q, o and MLP, and attends to the trunk's K and V (ICaRus, arXiv 2603.13281, the logical decoder).
"""

from __future__ import annotations

import numpy as np

from icarus_jax.weights.checkpoint import TrunkCheckpoint
from icarus_jax.weights.rope import frequencies


def _norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _rope(x, config, layer):
    if layer in config.nope_layers:
        return x
    length, h = len(x), round(config.head_dim * config.partial_rotary_factor)
    local = config.local_rope_theta is not None and layer not in config.full_attention_layers
    theta = config.local_rope_theta if local else config.rope_theta
    angles = np.arange(length)[:, None] / theta ** (np.arange(0, h, 2) / h)
    if config.rope_scaling and not local:  # transformers judges the frequencies in test_families.py
        angles = np.arange(length)[:, None] * frequencies(config)
    factor = config.rope_scaling.attention_factor if config.rope_scaling and not local else 1.0
    cos, sin = factor * np.cos(angles)[:, None], factor * np.sin(angles)[:, None]
    if config.rope_interleaved:
        a, b = x[..., :h:2], x[..., 1:h:2]
        pairs = np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(*x.shape[:-1], h)
        return np.concatenate([pairs, x[..., h:]], -1)
    a, b = x[..., : h // 2], x[..., h // 2 : h]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., h:]], -1)


def _cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def _activation(config, x):
    if config.hidden_act == "silu":
        return x / (1 + np.exp(-x))
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _gated(config, gate, up):
    if config.swiglu_limit is None:
        return _activation(config, gate) * up
    gate, up = np.minimum(gate, config.swiglu_limit), np.clip(up, -config.swiglu_limit, config.swiglu_limit)
    return (up + 1) * gate / (1 + np.exp(-config.swiglu_alpha * gate))


def mixture(config, router, gate, up, down, x, biases=(0, 0, 0, 0)):
    """The experts of one layer, row by row. gate, up [E, D, F], down [E, F, D]; biases: the router's, and theirs."""
    out = np.zeros_like(x)
    of_router, *of_experts = biases
    gate_bias, up_bias, down_bias = (
        np.broadcast_to(b, (len(gate), w.shape[2])) for b, w in zip(of_experts, (gate, up, down), strict=True)
    )
    for row, logits in enumerate(x @ router + of_router):
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        chosen = np.argsort(-weights)[: config.num_experts_per_tok]
        total = weights[chosen].sum() if config.norm_topk_prob else 1.0
        for expert in chosen:
            z = _gated(config, x[row] @ gate[expert] + gate_bias[expert], x[row] @ up[expert] + up_bias[expert])
            out[row] += weights[expert] / total * (z @ down[expert] + down_bias[expert])
    return out


def _run(trunk: TrunkCheckpoint, tokens, adapter, kv):
    """One stream. `kv`: per layer (K, V) to attend to, or None to make one's own. Returns (hidden, kv made)."""
    c = trunk.config
    p = {name: np.asarray(w, np.float64) for name, w in trunk.params.items()}
    group = c.num_heads // c.num_kv_heads
    length = len(tokens)
    delta = lambda t, l, x: x @ adapter[t][0][l] @ adapter[t][1][l] if adapter and t in adapter else 0.0  # noqa: E731
    norm = lambda name, l, x: _norm(x, p[name][l], c.rms_norm_eps) if name in p else x  # noqa: E731
    scale = 1 / np.sqrt(c.head_dim) if c.attention_multiplier is None else c.attention_multiplier
    x = p["embed"][tokens] * c.embedding_multiplier
    made = []
    for l in range(c.num_layers):
        y = norm("attn_norm", l, x)
        qkv = np.einsum("td,dkgh->tkgh", y, p["qkv"][l])
        if c.qkv_bias:
            qkv = qkv + p["qkv_bias"][l]
        q = qkv[:, :, :group].reshape(length, -1) + delta("q_proj", l, y)
        k = qkv[:, :, group].reshape(length, -1) + delta("k_proj", l, y)
        v = (qkv[:, :, group + 1].reshape(length, -1) + delta("v_proj", l, y)).reshape(length, c.num_kv_heads, -1)
        if c.qk_norm_whole:
            q, k = norm("q_norm", l, q), norm("k_norm", l, k)
        q, k = q.reshape(length, c.num_heads, -1), k.reshape(length, c.num_kv_heads, -1)
        if not c.qk_norm_whole:
            q, k = norm("q_norm", l, q), norm("k_norm", l, k)
        made.append((_rope(k, c, l), v))
        keys, values = (np.repeat(a, group, axis=1) for a in (kv or made)[l])
        q = _rope(q, c, l)
        if c.rope_scaling and c.rope_scaling.llama_4_scaling_beta:
            turns = np.floor(np.arange(length) / c.rope_scaling.original_max_position_embeddings)
            q = q * (1 + c.rope_scaling.llama_4_scaling_beta * np.log(1 + turns))[:, None, None]
        scores = np.einsum("qnh,tnh->nqt", q, keys) * scale
        seen, at = np.tri(length, dtype=bool), np.arange(length)
        if c.sliding_window and l not in c.full_attention_layers:
            seen = seen & (at > at[:, None] - c.sliding_window)
        scores = np.where(seen, _cap(scores, c.attn_logit_softcapping), -np.inf)
        if c.attention_sinks:
            sinks = np.broadcast_to(p["sinks"][l][:, None, None], (*scores.shape[:2], 1))
            scores, values = np.concatenate([scores, sinks], 2), np.concatenate([values, np.zeros_like(values[:1])])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        a = np.einsum("nqt,tnh->qnh", weights / weights.sum(-1, keepdims=True), values).reshape(length, -1)
        o = a @ p["o"][l] + (p["o_bias"][l] if c.o_bias else 0) + delta("o_proj", l, a)
        x = x + c.residual_multiplier * norm("attn_post_norm", l, o)
        y = norm("mlp_norm", l, x)
        if c.num_experts:
            names = ("router", "experts_gate", "experts_up", "experts_down")
            biases = [p[f"{name}_bias"][l] for name in names] if c.expert_bias else (0, 0, 0, 0)
            mixed = mixture(c, *(p[name][l] for name in names), y, biases)
            x = x + c.residual_multiplier * norm("mlp_post_norm", l, mixed)
            continue
        gate = y @ p["gate_up"][l][:, 0] + delta("gate_proj", l, y)
        up = y @ p["gate_up"][l][:, 1] + delta("up_proj", l, y)
        z = _gated(c, gate, up)
        x = x + c.residual_multiplier * norm("mlp_post_norm", l, z @ p["down"][l] + delta("down_proj", l, z))
    return x, made


def logits(trunk: TrunkCheckpoint, tokens, adapter=None, *, shared: bool = True, decoder=None) -> np.ndarray:
    """Logits f64[len(tokens), V] of a head. shared: over the trunk's K/V; else over its own (an ordinary LoRA).

    decoder: a checkpoint whose weights are the head's own (full fine-tuning); none: the trunk's.
    """
    kv = _run(trunk, tokens, None, None)[1] if (adapter or decoder) and shared else None
    trunk = decoder or trunk
    x, _ = _run(trunk, tokens, adapter, kv)
    head = trunk.params["embed" if trunk.config.tie_word_embeddings else "lm_head"]
    norm = np.asarray(trunk.params["final_norm"], np.float64)
    x = _norm(x, norm, trunk.config.rms_norm_eps) @ np.asarray(head, np.float64).T
    return _cap(x / trunk.config.logits_scaling, trunk.config.final_logit_softcapping)


def greedy(trunk: TrunkCheckpoint, prompt, steps: int, adapter=None, *, shared=True, decoder=None) -> list[int]:
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(logits(trunk, tokens, adapter, shared=shared, decoder=decoder)[-1].argmax()))
    return tokens[len(prompt) :]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
