"""The options of the engine, and how it serves a head."""

from __future__ import annotations

import dataclasses
import re

KV_KINDS = ("base", "shared", "activated", "isolated")  # how a model uses the KV cache: docs/design.md, section 2
KERNELS = ("auto", "xla", "cpu", "tpu", "gpu")
DTYPES = ("float32", "bfloat16")  # of weights and activations
# Of KV pages: what engine.kv_dtype says -> the dtype.
KV_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}
AS_STORED, INT4 = "as_stored", "int4"
WEIGHTS = ("", "int8", "fp8", INT4, AS_STORED)  # how weights of matrix products are kept; "": in dtype
WARMUPS = ("all", "background", "off")  # which programs are compiled before a step needs them (engine/warmup.py)


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
        weights: How the weights of matrix products are kept, one of WEIGHTS: in 8 bits, in 4 ('int4'), as a quantised
            checkpoint has them ('as_stored'), or in `dtype` (''). docs/quantisation.md has the details.
        kv_dtype: The dtype of the KV pages, one of KV_DTYPES. For those of 8 bits the engine calibrates scales when it
            starts (engine/kv_scales.py).
        kernels: The implementation of the ops, one of KERNELS. 'auto': the one written for the platform.
        enable_prefix_caching: Whether pages are kept for later prompts.
        host_cache_bytes: How many bytes of pages are kept in host memory too, for when the device's run out. 0: none.
        page_store: A folder or bucket (fsspec's URL) that keeps pages for later starts and other engines; '': none.
        page_store_bytes: How many bytes a local folder of pages may have. A bucket is limited by its own rules.
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
    host_cache_bytes: int = 0
    page_store: str = ""
    page_store_bytes: int = 64 << 30
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
            least = 0 if field.name.startswith(("max_lora", "host_cache")) else 1
            if field.type == "int" and value < least:
                raise ValueError(f"engine.{field.name}={value}; it must be at least {least}")
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
