"""The product of rows and one layer of stacked weights."""

from pallas_kernels.linear.api import IMPLEMENTATIONS, linear
from pallas_kernels.linear.panels import Panels, pack, pack_transposed

__all__ = ["IMPLEMENTATIONS", "Panels", "linear", "pack", "pack_transposed"]
