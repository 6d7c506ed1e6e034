"""Writes of new K/V into the pages of the cache, in place."""

from pallas_kernels.kv_append.api import IMPLEMENTATIONS, kv_append

__all__ = ["IMPLEMENTATIONS", "kv_append"]
