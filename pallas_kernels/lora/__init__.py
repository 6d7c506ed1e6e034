"""Low-rank adapters (LoRA), chosen row by row."""

from pallas_kernels.lora.api import IMPLEMENTATIONS, lora
from pallas_kernels.lora.low_rank import LowRank

__all__ = ["IMPLEMENTATIONS", "LowRank", "lora"]
