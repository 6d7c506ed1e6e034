"""Frozen configuration. Imports nothing of ours.

Axis letters (docs/design.md): T writer rows, R reader rows, B = T + R rows, S sampled rows, P pages per
sequence, L layers, N query heads, K KV heads, G = N / K, H head dim, D model, F MLP, V vocabulary, A adapter
slots, r rank.
"""

from __future__ import annotations

import dataclasses
import re

KV_KINDS = ("base", "shared", "activated", "isolated")
FAMILIES = ("llama", "qwen2", "qwen3")
LORA_TARGETS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # what a `shared` head may change
KV_TARGETS = ("k_proj", "v_proj")
TARGETS = (*KV_TARGETS, *LORA_TARGETS)
KERNELS = ("auto", "xla", "cpu", "tpu", "gpu")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Long-context scaling of the rotary frequencies; the field names are Hugging Face's.

    kind: 'linear' (every frequency divided by `factor`) or 'llama3' (Llama 3.1's by-wavelength interpolation).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama / Qwen families."""

    family: str
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm over H on q and k, before rope

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model family {self.family!r}; known: {', '.join(FAMILIES)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def group_size(self) -> int:
        """G: query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """(din, dout) of every projection that an adapter may change."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """One served task model: where its adapter lies and how it uses the KV cache."""

    name: str
    path: str  # a PEFT folder, or 'random:SEED' (an untrained adapter, for load tests)
    kv: str = "shared"  # 'shared' | 'activated' | 'isolated'
    invocation_tokens: tuple[int, ...] = ()  # of an `activated` head (aLoRA): where its adapter comes on
    pinned: bool = False  # never leaves its adapter slot

    def __post_init__(self):
        if self.kv not in KV_KINDS[1:]:
            raise ValueError(f"head {self.name!r}: kv={self.kv!r}; it is one of {', '.join(KV_KINDS[1:])}")
        if (self.kv == "activated") != bool(self.invocation_tokens):
            raise ValueError(f"head {self.name!r}: kv='activated' and invocation tokens go together")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. Every compiled shape follows from these."""

    page_size: int = 16  # tokens a page
    num_pages: int = 2048
    max_num_seqs: int = 32  # sequences in one step
    max_num_batched_tokens: int = 512  # writer rows in one step (chunked prefill)
    max_model_len: int = 2048  # prompt plus output
    dtype: str = "float32"  # weights, activations
    kv_dtype: str = "float32"
    kernels: str = "auto"  # which implementation of the ops: one of KERNELS; 'auto' is the backend's own
    enable_prefix_caching: bool = True
    max_loras: int = 0  # adapter slots on the device (0: one for each head given at the start); more heads take turns
    max_lora_rank: int = 0  # largest rank that can be loaded (0: that of the heads given at the start)
    writer_adapters: bool = False  # prepare for `isolated` and `activated` heads, even if none is given at the start
    check_reuse: float = 0.0  # debug: fraction of the requests whose reused pages are computed again and compared
    mesh: str = "1x1"  # devices, DATAxMODEL: `model` splits weights and KV heads, `data` the rows of a step

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1 and not field.name.startswith("max_lora"):
                raise ValueError(f"engine.{field.name}={value}; it must be at least 1")
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
        """(data, model): the mesh's devices along each axis."""
        data, model = self.mesh.split("x")
        return int(data), int(model)
