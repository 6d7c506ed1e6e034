"""Frozen configuration of models, heads and the engine.

Axis letters (docs/design.md, section 3): T writer rows, R reader rows, B = T + R rows, S rows with logits, P pages per
sequence, L layers, N query heads, K KV heads, G = N / K, H head dim, D model, F MLP, V vocabulary, A adapter slots,
r rank.
"""

from __future__ import annotations

import dataclasses
import re

KV_KINDS = ("base", "shared", "activated", "isolated")  # how a model uses the KV cache: docs/design.md, section 2
FAMILIES = ("llama", "qwen2", "qwen3")
LORA_TARGETS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # projections that a `shared` head may change
KV_TARGETS = ("k_proj", "v_proj")
TARGETS = (*KV_TARGETS, *LORA_TARGETS)
KERNELS = ("auto", "xla", "cpu", "tpu", "gpu")
DTYPES = ("float32", "bfloat16")  # of weights, activations and K/V


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies for long contexts. Names are those of Hugging Face's `rope_scaling`.

    Attributes:
        kind: 'linear' (every frequency is divided by `factor`), or 'llama3' (weights/rope.py).
        factor: By how much frequencies are divided.
        low_freq_factor: Of 'llama3'.
        high_freq_factor: Of 'llama3'.
        original_max_position_embeddings: Of 'llama3': the context length in tokens before scaling.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes and options of a decoder-only transformer of the Llama and Qwen families.

    Attributes:
        family: One of FAMILIES.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_layers: L.
        num_heads: N, the query heads.
        num_kv_heads: K.
        head_dim: H.
        rope_theta: The base of the rotary frequencies.
        rope_scaling: Their scaling; None for none.
        rms_norm_eps: What RMSNorm adds to the mean square.
        max_position_embeddings: The context length in tokens that the model was made for.
        tie_word_embeddings: Whether the embeddings are the weights of the logits too.
        qkv_bias: Whether q, k and v have a bias (Qwen2).
        qk_norm: Whether RMSNorm over H is applied to q and k before the rotation (Qwen3).
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
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model family {self.family!r}; known: {', '.join(FAMILIES)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def group_size(self) -> int:
        """G, the query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """The (din, dout) of each projection in TARGETS."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}


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
        kv_dtype: The dtype of the KV pages, one of DTYPES.
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
    """

    page_size: int = 16
    num_pages: int = 2048
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int = 2048
    dtype: str = "float32"
    kv_dtype: str = "float32"
    kernels: str = "auto"
    enable_prefix_caching: bool = True
    max_loras: int = 0
    max_lora_rank: int = 0
    writer_adapters: bool = False
    check_reuse: float = 0.0
    async_scheduling: bool = True
    mesh: str = "1x1"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1 and not field.name.startswith("max_lora"):
                raise ValueError(f"engine.{field.name}={value}; it must be at least 1")
        for name in ("dtype", "kv_dtype"):
            if (value := getattr(self, name)) not in DTYPES:
                raise ValueError(f"engine.{name}={value!r}; it is one of {', '.join(DTYPES)}")
        if self.kernels not in KERNELS:
            raise ValueError(f"engine.kernels={self.kernels!r}; it is one of {', '.join(KERNELS)}")
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
