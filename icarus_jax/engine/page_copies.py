"""Copies and comparisons of pages, in calls of a few fixed sizes: so there are few programs to compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from icarus_jax.engine.programs import COPY_ROWS, Programs
from icarus_jax.scheduling.prefix_cache import load_pages


def move_rows(count: int, page_size: int) -> int:
    """Returns the size of a call that moves pages between the device and the host; there are three.

    Args:
        count: How many pages are to be moved, at most `load_pages`.
        page_size: Tokens per page.
    """
    return next(size for size in (1, 8, load_pages(page_size)) if count <= size)


def padded(pages: Sequence[int], size: int, padding: int) -> np.ndarray:
    """Returns pages as i32[size].

    Args:
        pages: Page numbers.
        size: At least as many.
        padding: What follows them.
    """
    return np.array([*pages, *[padding] * (size - len(pages))], np.int32)


def copy_calls(copies: Sequence[tuple[int, int]], num_pages: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Splits copies into calls of `Programs.copy_pages`.

    Args:
        copies: Pairs of pages (src, dst).
        num_pages: The number of all pages.

    Yields:
        The arguments src and dst of a call.
    """
    for first in range(0, len(copies), COPY_ROWS):
        src, dst = zip(*copies[first : first + COPY_ROWS], strict=True)
        yield padded(src, COPY_ROWS, 0), padded(dst, COPY_ROWS, num_pages)


def compare(
    programs: Programs, kv_pages: jax.Array, a: Sequence[int], b: Sequence[int]
) -> list[tuple[bool, float, float]]:
    """Compares pages in all layers.

    Args:
        programs: The compiled programs.
        kv_pages: The pages.
        a: Page numbers.
        b: As many.

    Returns:
        For each pair whether the pages are equal, their largest difference, and the largest magnitude in the page of
        `a`.
    """
    results = []
    for first in range(0, len(a), COPY_ROWS):
        pairs = [pages[first : first + COPY_ROWS] for pages in (a, b)]
        compared = jax.device_get(programs.compare_pages(kv_pages, *(padded(pages, COPY_ROWS, 0) for pages in pairs)))
        found = list(zip(*(values.tolist() for values in compared), strict=True))
        results += found[: len(pairs[0])]
    return results
