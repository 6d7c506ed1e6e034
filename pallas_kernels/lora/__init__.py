"""Low-rank adapters (LoRA), chosen row by row."""

from pallas_kernels.lora.api import IMPLEMENTATIONS, lora

__all__ = ["IMPLEMENTATIONS", "lora"]
