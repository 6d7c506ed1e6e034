"""Low-rank adapters, a different one for every row."""

from pallas_kernels.lora.api import IMPLEMENTATIONS, lora

__all__ = ["IMPLEMENTATIONS", "lora"]
