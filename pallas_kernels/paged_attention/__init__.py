"""Paged attention: every head decodes from one KV array."""

from pallas_kernels.paged_attention.api import IMPLEMENTATIONS, paged_attention
from pallas_kernels.paged_attention.work import Runs, SequenceRows, WorkList, WorkShape, build_work, pages_read

__all__ = [
    "IMPLEMENTATIONS",
    "Runs",
    "SequenceRows",
    "WorkList",
    "WorkShape",
    "build_work",
    "paged_attention",
    "pages_read",
]
