"""In-place writes of K/V into the pages."""

from pallas_kernels.kv_append.api import IMPLEMENTATIONS, kv_append

__all__ = ["IMPLEMENTATIONS", "kv_append"]
