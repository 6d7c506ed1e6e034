"""Frozen configuration of models, heads and the engine.

Axis letters (docs/design.md, section 3): T writer rows, R reader rows, B = T + R rows, S rows with logits, P pages per
sequence, L layers, N query heads, K KV heads, G = N / K, H head dim, D model, F MLP, E experts, V vocabulary, A adapter
slots, r rank.
"""

from __future__ import annotations

import dataclasses
import re

KV_KINDS = ("base", "shared", "activated", "isolated")  # how a model uses the KV cache: docs/design.md, section 2
LORA_TARGETS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # projections that a `shared` head may change
KV_TARGETS = ("k_proj", "v_proj")
TARGETS = (*KV_TARGETS, *LORA_TARGETS)
KERNELS = ("auto", "xla", "cpu", "tpu", "gpu")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # of the MLP's gate, under Hugging Face's names
DTYPES = ("float32", "bfloat16")  # of weights and activations
# Of KV pages: what engine.kv_dtype says -> the dtype.
KV_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}
AS_STORED = "as_stored"
WEIGHTS = ("", "int8", "fp8", AS_STORED)  # how weights of matrix products are kept; "": in dtype
WARMUPS = ("all", "background", "off")  # which programs are compiled before a step needs them (engine/warmup.py)


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
        qkv_bias: Whether q, k and v have a bias (Qwen2, GLM-4).

    Mixture of experts (Qwen3-MoE):
        num_experts: E, the experts of each layer; None: a layer has one MLP.
        num_experts_per_tok, norm_topk_prob: To how many of them a row is sent; whether their weights add up to 1.

    Multipliers (Granite):
        embedding_multiplier: Of the embeddings.
        attention_multiplier: Of the attention scores; None: H ** -0.5.
        residual_multiplier: Of what attention and MLP add to the residual stream.
        logits_scaling: What the logits are divided by.

    Others (Gemma):
        hidden_act: The activation of the MLP's gate, one of ACTIVATIONS.
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
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    norm_topk_prob: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    hidden_act: str = "silu"
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


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A task model: where its adapter is, and how it uses the KV cache.

    Attributes:
        name: The head's name as a model.
        path: A PEFT folder, an Orbax checkpoint, or 'random:SEED' (an untrained adapter for load tests).
        kv: 'shared' (an ICaRus head), 'activated' (aLoRA) or 'isolated' (an ordinary LoRA).
        invocation_tokens: The tokens at which the adapter of an `activated` head comes on (aLoRA, arXiv 2504.12397).
        pinned: Whether the head keeps its adapter slot while it is idle.
    """

    name: str
    path: str
    kv: str = "shared"
    invocation_tokens: tuple[int, ...] = ()
    pinned: bool = False

    def __post_init__(self):
        if self.kv not in KV_KINDS[1:]:
            raise ValueError(f"head {self.name!r}: kv={self.kv!r}; it is one of {', '.join(KV_KINDS[1:])}")
        if (self.kv == "activated") != bool(self.invocation_tokens):
            raise ValueError(f"head {self.name!r}: kv='activated' and invocation tokens go together")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The sizes and options of the engine. All compiled shapes follow from them.

    Attributes:
        page_size: Tokens per page.
        num_pages: The number of pages.
        max_num_seqs: The most sequences that run at once.
        max_num_batched_tokens: The most writer rows of one step. Longer prompts are prefilled in chunks.
        max_model_len: The most tokens of a prompt and its output together.
        dtype: The dtype of weights and activations, one of DTYPES.
        weights: How the weights of matrix products are kept, one of WEIGHTS: in 8 bits, with a scale for each output
            channel; 'as_stored': in the blocks of a GGUF file, on a single CPU device; '': in `dtype`.
        kv_dtype: The dtype of the KV pages, one of KV_DTYPES. For those of 8 bits the engine calibrates scales when it
            starts (engine/kv_scales.py).
        kernels: The implementation of the ops, one of KERNELS. 'auto': the one written for the platform.
        enable_prefix_caching: Whether pages are kept for later prompts.
        max_loras: A, the adapter slots on the device. If there are more heads, they take turns. 0: one slot for each
            head given at the start.
        max_lora_rank: r, the largest rank of an adapter. 0: that of the heads given at the start.
        writer_adapters: Whether `isolated` and `activated` heads can be loaded later. If the engine starts with such a
            head, they can in any case.
        check_reuse: Debug mode: the fraction of requests whose reused pages are recomputed and compared.
        async_scheduling: Whether a step is planned and launched while the one before it runs.
        mesh: The devices as DATAxMODEL. `model` splits weights and KV heads, `data` splits the rows of a step.
        warmup: Programs compiled at the start: 'all'; a plain request's, then others in the 'background'; none: 'off'.
    """

    page_size: int = 16
    num_pages: int = 2048
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int = 2048
    dtype: str = "float32"
    weights: str = ""
    kv_dtype: str = "float32"
    kernels: str = "auto"
    enable_prefix_caching: bool = True
    max_loras: int = 0
    max_lora_rank: int = 0
    writer_adapters: bool = False
    check_reuse: float = 0.0
    async_scheduling: bool = True
    mesh: str = "1x1"
    warmup: str = "background"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1 and not field.name.startswith("max_lora"):
                raise ValueError(f"engine.{field.name}={value}; it must be at least 1")
        for name, known in (("dtype", DTYPES), ("kv_dtype", KV_DTYPES), ("kernels", KERNELS), ("warmup", WARMUPS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"engine.{name}={value!r}; it is one of {', '.join(known)}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"engine.weights={self.weights!r}; it is one of {', '.join(map(repr, WEIGHTS))}")
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.mesh):
            raise ValueError(f"engine.mesh={self.mesh!r}; it is DATAxMODEL, two numbers of devices: '1x8', '2x4'")
        need = -(-self.max_model_len // self.page_size)
        if self.num_pages < need:
            raise ValueError(
                f"engine.num_pages={self.num_pages} cannot hold one sequence of max_model_len={self.max_model_len}: "
                f"at least {need} pages of {self.page_size} tokens are needed"
            )

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """The numbers of devices (data, model)."""
        data, model = self.mesh.split("x")
        return int(data), int(model)
