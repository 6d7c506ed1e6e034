"""Paged attention: the rows of all heads and of the trunk attend to one paged KV cache.

`build_work` turns the sequences of a step into a work list on the host; `paged_attention` runs it on the device.
"""

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
