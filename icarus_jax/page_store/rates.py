"""When loading a page beats computing it: by how long both have taken lately."""

from __future__ import annotations

KEPT = 0.9  # of what was measured before, with each new measurement
TRIES = 32  # of so many loads that would not pay one is made all the same, to measure again


class Rate:
    """Seconds a page. The latest measurements count most."""

    def __init__(self) -> None:
        """Starts without a measurement."""
        self._pages = self._seconds = 0.0

    def add(self, pages: float, seconds: float) -> None:
        """Adds a measurement.

        Args:
            pages: How many pages.
            seconds: How long they took together.
        """
        self._pages = KEPT * self._pages + pages
        self._seconds = KEPT * self._seconds + seconds

    @property
    def seconds_per_page(self) -> float | None:
        """The average; None before the first measurement."""
        return self._seconds / self._pages if self._pages else None


class CopyRule:
    """Decides whether pages are loaded or computed.

    Attributes:
        loading: How long a page takes from the request for it until it is on the device.
        computing: How long a page takes to compute.
    """

    def __init__(self) -> None:
        """Starts without measurements: what was never measured is tried."""
        self.loading, self.computing = Rate(), Rate()
        self._not_paid = 0

    def pays(self) -> bool:
        """Returns whether the next pages should be loaded."""
        load, compute = self.loading.seconds_per_page, self.computing.seconds_per_page
        if load is None or compute is None or load < compute:
            return True
        self._not_paid += 1
        return self._not_paid % TRIES == 0
