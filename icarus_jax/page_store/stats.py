"""What the page store counts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class StoreStats:
    """Counters since the start, and gauges.

    Attributes:
        host_pages, host_bytes: Gauges: pages in host memory, and their bytes.
        folder_pages, folder_bytes: Gauges: pages in the folder or bucket, as far as this engine knows.
        saved_pages, saved_bytes: Pages saved, those that were there already included.
        lost_pages: Pages that were evicted before they could be saved, or whose store did not take them.
        host_hits: Pages found in host memory.
        folder_hits: Pages found in the folder or bucket.
        misses: Pages looked for that were nowhere.
        invalid_pages: Those of them that were there, torn, altered or foreign. They were removed.
        loads: How often a waiting sequence had pages loaded.
        loads_not_paid: How often it had not, as computing them is faster, or the store did not answer.
        loaded_pages, loaded_bytes: Pages copied to the device.
        load_seconds: How long that took, from the request for the pages on.
    """

    host_pages: int = 0
    host_bytes: int = 0
    folder_pages: int = 0
    folder_bytes: int = 0
    saved_pages: int = 0
    saved_bytes: int = 0
    lost_pages: int = 0
    host_hits: int = 0
    folder_hits: int = 0
    misses: int = 0
    invalid_pages: int = 0
    loads: int = 0
    loads_not_paid: int = 0
    loaded_pages: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
