"""The product of rows and one layer of stacked weights."""

from pallas_kernels.linear.api import IMPLEMENTATIONS, linear
from pallas_kernels.linear.packing import pack, pack_blocks, pack_transposed
from pallas_kernels.linear.panels import Panels
from pallas_kernels.linear.quantised import Quantised, multiply, multiply_table, quantise
from pallas_kernels.linear.quantised_panels import QuantisedPanels

__all__ = [
    "IMPLEMENTATIONS",
    "Panels",
    "Quantised",
    "QuantisedPanels",
    "linear",
    "multiply",
    "multiply_table",
    "pack",
    "pack_blocks",
    "pack_transposed",
    "quantise",
]
