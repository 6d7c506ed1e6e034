"""Rows times one layer of stacked weights."""

from pallas_kernels.linear.api import IMPLEMENTATIONS, linear

__all__ = ["IMPLEMENTATIONS", "linear"]
