"""The sizes and options of a trunk."""

from __future__ import annotations

import dataclasses

LORA_TARGETS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # projections that a `shared` head may change
KV_TARGETS = ("k_proj", "v_proj")
TARGETS = (*KV_TARGETS, *LORA_TARGETS)
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # of the MLP's gate, under Hugging Face's names


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies for long contexts (weights/rope.py). Names are those of Hugging Face.

    Attributes:
        kind: 'linear' (every frequency is divided by `factor`), 'llama3', 'yarn', 'dynamic' or 'longrope'.
        factor: By how much frequencies are divided, or the context is longer than before.
        low_freq_factor, high_freq_factor: Of 'llama3'.
        original_max_position_embeddings: Of all but 'linear': the context length in tokens before scaling.
        attention_factor: Of 'yarn' and 'longrope': what cos and sin are multiplied by.
        beta_fast, beta_slow, truncate: Of 'yarn'.
        llama_4_scaling_beta: By how much queries behind the original length grow (layers.py); None: not (Ministral 3).
        short_factor: Of 'longrope': what each frequency is divided by if no sequence exceeds the original length.
        long_factor: Of 'longrope': likewise, if sequences do.
        max_model_len: Of 'dynamic' and 'longrope', whose frequencies depend on it: the length of the longest sequence.
            None: the original length.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    llama_4_scaling_beta: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    max_model_len: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes and options of a decoder-only transformer with RMSNorm, rotary positions and a gated MLP.

    The options say what a family does; the forward pass never asks for the family.

    Sizes:
        family: The family's name, one of weights.families.FAMILIES.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F; of each expert, where there are experts.
        num_layers: L.
        num_heads: N, the query heads.
        num_kv_heads: K.
        head_dim: H.
        max_position_embeddings: The context length in tokens that the model was made for.

    Positions:
        rope_theta: The base of the rotary frequencies.
        rope_scaling: Their scaling; None for none.
        partial_rotary_factor: The part of H, from its first lane on, that is rotated (Phi-4-mini).
        rope_interleaved: Whether neighbouring lanes are rotated, not the halves of the rotated part (GLM-4).
        nope_layers: The layers that do not rotate q and k (SmolLM3).
        local_rope_theta: The base in the layers with a window, which have no scaling (Gemma 3); None: rope_theta.

    Windows:
        sliding_window: How many positions a row sees, up to its own; None: all.
        full_attention_layers: The layers without a window, of a model that has one (Gemma).

    Norms:
        rms_norm_eps: What RMSNorm adds to the mean square.
        pre_norm: Whether attention and MLP begin with RMSNorm (all but OLMo 2).
        post_norm: Whether RMSNorm is applied to what they add to the residual stream (OLMo 2, GLM-4).
        qk_norm: Whether RMSNorm is applied to q and k before the rotation, over H (Qwen3).
        qk_norm_whole: Whether it is that over the lanes of all attention heads together (OLMo 2).

    Weights:
        tie_word_embeddings: Whether the embeddings are the weights of the logits too.
        qkv_bias, o_bias: Whether q, k and v have a bias (Qwen2, GLM-4); whether attention's output has (gpt-oss).
        attention_sinks: Whether attention heads have sinks: scores of a token whose V is zero (gpt-oss).

    Mixture of experts (Qwen3-MoE, gpt-oss):
        num_experts: E, the experts of each layer; None: a layer has one MLP.
        num_experts_per_tok, norm_topk_prob: To how many of them a row is sent; whether their weights add up to 1.
        expert_bias: Whether the router and the experts have a bias (gpt-oss).

    Multipliers (Granite):
        embedding_multiplier: Of the embeddings.
        attention_multiplier: Of the attention scores; None: H ** -0.5.
        residual_multiplier: Of what attention and MLP add to the residual stream.
        logits_scaling: What the logits are divided by.

    Others (Gemma, gpt-oss):
        hidden_act: The activation of the MLP's gate, one of ACTIVATIONS.
        swiglu_limit, swiglu_alpha: Of the clamped SwiGLU in its place (gpt-oss, layers.py); None: there is none.
        attn_logit_softcapping: The soft cap of the attention scores; None for none.
        final_logit_softcapping: That of the logits.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    rope_interleaved: bool = False
    nope_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    rms_norm_eps: float = 1e-5
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    attention_sinks: bool = False
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    norm_topk_prob: bool = False
    expert_bias: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    hidden_act: str = "silu"
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def group_size(self) -> int:
        """G, the query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rotary_dim(self) -> int:
        """The lanes of an attention head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def context_length(self) -> int:
        """The most tokens of a sequence. 'linear' and 'dynamic' lengthen it; in all others it is counted already."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind in ("llama3", "longrope") or self.local_rope_theta:
            return self.max_position_embeddings
        if scaling.kind == "yarn":  # some files count it in max_position_embeddings, others (Qwen) do not
            return max(self.max_position_embeddings, int(scaling.factor * scaling.original_max_position_embeddings))
        return int(self.max_position_embeddings * scaling.factor)

    @property
    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """The (din, dout) of each projection in TARGETS that the model has. Experts are none."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        return attention | ({} if self.num_experts else {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)})

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The projections of LORA_TARGETS that the model has."""
        return tuple(target for target in LORA_TARGETS if target in self.target_shapes)

    def serving(self, max_model_len: int) -> ModelConfig:
        """Returns the model as it serves sequences of at most `max_model_len` tokens.

        Scalings of the kinds 'dynamic' and 'longrope' choose frequencies by the length of a sequence. Keys in the cache
        were rotated by one choice, so that it cannot change as a sequence grows: the longest one's counts for all. A
        window that no sequence is longer than hides nothing, and is left out.
        """
        scaling = self.rope_scaling and dataclasses.replace(self.rope_scaling, max_model_len=max_model_len)
        window = self.sliding_window if (self.sliding_window or 0) < max_model_len else None
        return dataclasses.replace(self, rope_scaling=scaling, sliding_window=window)
