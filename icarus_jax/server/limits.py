"""Limits on what may wait for the engine, and on how long a request may take.

A request waits until its first token. Past a limit the server answers 429, and says from the rate at which waiting
requests have been served when to try again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from icarus_jax.server.body import ApiError

RATE_SECONDS = 30.0  # the rate is an exponential average over about this time
MAX_RETRY_SECONDS = 60


class Rate:
    """How fast waiting things are served: an exponential average over the time in which any wait."""

    def __init__(self, clock: Callable[[], float]):
        """Starts with nothing waiting.

        Args:
            clock: returns the time in seconds.
        """
        self.waiting = 0
        self._clock = clock
        self._since = 0.0  # `_served` and `_seconds` are of this time
        self._served = 0.0
        self._seconds = 0.0

    def enter(self, amount: int) -> None:
        """Counts things that begin to wait."""
        if not self.waiting:
            self._since = self._clock()
        self.waiting += amount

    def leave(self, amount: int, served: bool) -> None:
        """Counts things that wait no more.

        Args:
            amount: how many.
            served: whether they have been served; else they have been given up.
        """
        now = self._clock()
        passed, self._since = now - self._since, now
        fade = math.exp(-passed / RATE_SECONDS)
        self._served = self._served * fade + (amount if served else 0)
        self._seconds = self._seconds * fade + passed
        self.waiting -= amount

    def seconds(self, amount: float) -> int:
        """Returns how long it will take to serve an amount: whole seconds, from 1 to MAX_RETRY_SECONDS.

        Args:
            amount: how many things.
        """
        if not self._served:  # nothing is known yet
            return 1
        return max(1, min(MAX_RETRY_SECONDS, math.ceil(amount * self._seconds / self._served)))


class Limit:
    """The limit on how much may wait: requests, or tokens."""

    def __init__(self, most: int, unit: str, shared: bool, clock: Callable[[], float]):
        """Starts with nothing waiting.

        Args:
            most: the limit; 0: none.
            unit: what is counted, for messages.
            shared: whether there are several tenants. None of them may then have more waiting than there is room left,
                so that there is always room for another.
            clock: returns the time in seconds.
        """
        self._most = most
        self._unit = unit
        self._shared = shared
        self._clock = clock
        self._tenants: dict[str, Rate] = {}

    def of(self, tenant: str) -> Rate:
        """Returns what waits of a tenant."""
        return self._tenants.setdefault(tenant, Rate(self._clock))

    def check(self, tenant: str, amount: int) -> None:
        """Checks that a tenant may let something wait. What would wait alone always may.

        Args:
            tenant: whose it is.
            amount: how much.

        Raises:
            ApiError: there is no room: status 429.
        """
        waiting = sum(rate.waiting for rate in self._tenants.values())
        own = self.of(tenant)
        excess = amount + waiting + (own.waiting if self._shared else 0) - self._most
        if not self._most or not waiting or excess <= 0:
            return
        seconds = own.seconds(excess)
        message = (
            f"the server is overloaded: {waiting} {self._unit} wait, {own.waiting} of them yours, and "
            f"at most {self._most} may; try again in {seconds} s"
        )
        raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


class Limits:
    """What waits for the engine, by tenant. Thread-safe."""

    def __init__(
        self,
        max_waiting_requests: int = 0,
        max_waiting_tokens: int = 0,
        shared: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts with nothing waiting.

        Args:
            max_waiting_requests: how many choices may wait; a request with n = 4 counts four times. 0: no limit.
            max_waiting_tokens: how many prompt tokens may wait; each prompt counts once. 0: no limit.
            shared: whether there are several tenants.
            clock: returns the time in seconds.
        """
        self._requests = Limit(max_waiting_requests, "requests", shared, clock)
        self._tokens = Limit(max_waiting_tokens, "prompt tokens", shared, clock)
        self._lock = threading.Lock()

    def enter(self, tenant: str, requests: int, tokens: int) -> Place:
        """Lets a request wait.

        Args:
            tenant: who sends it.
            requests: how many choices it has.
            tokens: how many tokens its prompts have.

        Raises:
            ApiError: too much waits already: status 429.
        """
        with self._lock:
            self._requests.check(tenant, requests)
            self._tokens.check(tenant, tokens)
            self._requests.of(tenant).enter(requests)
            self._tokens.of(tenant).enter(tokens)
        return Place(self, tenant, requests, tokens)

    def leave(self, tenant: str, requests: int, tokens: int, served: bool) -> None:
        """Counts choices that wait no more. Their Place calls it.

        Args:
            tenant: who sent them.
            requests: how many.
            tokens: the tokens of the prompts that do not wait any more.
            served: whether the engine has begun to answer; else they have been given up.
        """
        with self._lock:
            if requests:
                self._requests.of(tenant).leave(requests, served)
            if tokens:
                self._tokens.of(tenant).leave(tokens, served)


class Place:
    """The place of one request among those that wait."""

    def __init__(self, limits: Limits, tenant: str, requests: int, tokens: int):
        """Takes what `Limits.enter` has counted."""
        self._limits = limits
        self._tenant = tenant
        self._requests = requests
        self._tokens = tokens

    def leave(self, requests: int, tokens: int, served: bool = True) -> None:
        """Tells that some of the request's choices wait no more.

        Args:
            requests: how many choices.
            tokens: the tokens of the prompts that do not wait any more.
            served: whether the engine has begun to answer; else they have been given up.
        """
        self._requests -= requests
        self._tokens -= tokens
        self._limits.leave(self._tenant, requests, tokens, served)

    def give_up(self) -> None:
        """Tells that none of the request's choices waits any more."""
        self.leave(self._requests, self._tokens, served=False)


def header_timeout(header: str | None) -> float | None:
    """Reads the header X-Request-Timeout: how many seconds the request may take.

    Args:
        header: its value; None if it was not sent.

    Raises:
        ApiError: it is no positive number.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ApiError(400, "the header X-Request-Timeout must be a number of seconds above 0", "timeout")
    return seconds
