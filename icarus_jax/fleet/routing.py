"""Which replica answers a request: the one that has the pages of its conversation, unless that one is overloaded.

A conversation is known by its session id, or else by its beginning: the prompt is cut into pieces, and each prefix of
pieces is a key. The longest known key leads to the replica that answered last. The beginning of a prompt may be one
that many conversations have in common, such as a system prompt. A key that many different texts continue therefore
leads nowhere.

A conversation that is not known, or whose replica is overloaded, goes to the less loaded of two replicas drawn at
random (Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 12(10), 2001).

    router = Router()
    router.update(ReplicaLoad("a", queue=3, pages=0.4))  # whenever it is known
    first, *others = router.choose(request := Routed(conversation="x"))
    router.on_routed(request, first)
    router.remove("a")  # once it is gone
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from array import array
from collections import OrderedDict
from collections.abc import Sequence

FIRST_PIECE = 128  # characters or tokens of a prompt's first piece
GROWTH = 8  # each further piece is an eighth of all that is before it, but at least FIRST_PIECE


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """The settings of a router.

    Attributes:
        per_model: Whether each model has pages of its own, as with isolated adapters: a conversation is then known for
            each model separately.
        max_keys: How many keys are remembered. The least recently used ones are forgotten first.
        max_continuations: How many different texts may continue a key that leads to a replica.
        queue_factor, queue_slack: A replica is overloaded if it has more than queue_factor times the mean number of
            requests of the others, and queue_slack on top.
        pages_full, pages_slack: It is so, too, if more than this share of its pages is in use, and pages_slack more
            than the others' mean share.
        seed: The seed of the random draws.

    Raises:
        ValueError: A number is out of its range.
    """

    per_model: bool = False
    max_keys: int = 1 << 18
    max_continuations: int = 16
    queue_factor: float = 1.5
    queue_slack: int = 8
    pages_full: float = 0.9
    pages_slack: float = 0.1
    seed: int = 0

    def __post_init__(self):
        for name, low in (("max_keys", 1), ("max_continuations", 1), ("queue_factor", 1), ("queue_slack", 0),
                          ("pages_full", 0), ("pages_slack", 0)):  # fmt: skip
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """How busy a replica is.

    Attributes:
        replica: The replica's id.
        queue: Its requests, running and waiting.
        pages: The share of its pages that they hold, 0 to 1.
    """

    replica: str
    queue: int = 0
    pages: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Routed:
    """What the router needs to know of a request.

    Attributes:
        conversation: The session's id, or the request's prompt_cache_key; '' if the client names none.
        pieces: The prompt in pieces, in order. A later prompt of the conversation begins with the same pieces: those
            of a chat are its messages as text, those of a plain prompt come from `pieces_of`. Not used if the
            conversation is named.
        model: The name of the model. It counts with RoutingConfig.per_model only.
        cache_salt: The request's cache_salt. Conversations with different salts share no pages.
    """

    conversation: str = ""
    pieces: Sequence[str | bytes] = ()
    model: str = ""
    cache_salt: str = ""


def pieces_of(prompt: str | Sequence[int]) -> list[str | bytes]:
    """Cuts a prompt where any longer prompt that begins with it is cut, too. An unfinished last piece is left out.

    Args:
        prompt: The text or the token ids of a prompt.

    Returns:
        The pieces. They grow with the prompt, so that there are few of them.
    """
    pieces: list[str | bytes] = []
    start = 0
    while (end := start + max(FIRST_PIECE, start // GROWTH)) <= len(prompt):
        piece = prompt[start:end]
        pieces.append(piece if isinstance(piece, str) else array("q", piece).tobytes())
        start = end
    return pieces


class _Replica:
    """A replica that is alive, or was when a key led to it."""

    __slots__ = ("alive", "load", "place")

    def __init__(self, load: ReplicaLoad, place: int):
        self.load, self.place, self.alive = load, place, True


class _Known:
    """What a key leads to: the replica that answered last, and how many different texts continued the key."""

    __slots__ = ("continuations", "replica")

    def __init__(self, replica: _Replica):
        self.replica, self.continuations = replica, 0


class Router:
    """Chooses replicas for requests. Not thread-safe.

    Args:
        config: The settings; None for the defaults.
    """

    def __init__(self, config: RoutingConfig | None = None):
        self.config = config or RoutingConfig()
        self._random = random.Random(self.config.seed)
        self._replicas: dict[str, _Replica] = {}
        self._drawn_from: list[_Replica] = []  # the same, each at its `place`
        self._queue, self._pages = 0, 0.0  # summed over the replicas
        self._known: OrderedDict[bytes, _Known] = OrderedDict()  # the least recently used first

    @property
    def replicas(self) -> list[str]:
        """The ids of the replicas."""
        return list(self._replicas)

    def update(self, load: ReplicaLoad) -> None:
        """Notes how busy a replica is. A replica that is not known joins the others.

        Args:
            load: The replica's load.
        """
        replica = self._replicas.get(load.replica)
        if replica is None:
            replica = self._replicas[load.replica] = _Replica(load, len(self._drawn_from))
            self._drawn_from.append(replica)
        else:
            self._queue -= replica.load.queue
            self._pages -= replica.load.pages
        replica.load = load
        self._queue += load.queue
        self._pages += load.pages

    def remove(self, replica: str) -> None:
        """Forgets a replica and its conversations. If it comes back, it begins without any.

        Args:
            replica: The replica's id; one that is not known changes nothing.
        """
        gone = self._replicas.pop(replica, None)
        if gone is None:
            return
        gone.alive = False
        last = self._drawn_from.pop()
        if last is not gone:
            self._drawn_from[gone.place], last.place = last, gone.place
        self._queue -= gone.load.queue
        self._pages -= gone.load.pages

    def choose(self, request: Routed) -> list[str]:
        """Chooses a replica. Nothing is remembered until `on_routed`.

        Args:
            request: The request.

        Returns:
            The ids of up to three different replicas, the best one first; the others are there in case that it takes no
            requests. Empty if there are no replicas.
        """
        if not self._drawn_from:
            return []
        drawn = sorted(self._draw(), key=lambda replica: (replica.load.queue, replica.load.pages))
        home = self._home(self._keys(request))
        chosen = drawn if home is None or self._overloaded(home.load) else [home, *drawn]
        return list(dict.fromkeys(replica.load.replica for replica in chosen))

    def on_routed(self, request: Routed, replica: str) -> None:
        """Notes which replica answers a request: the conversation goes on there.

        Args:
            request: The request.
            replica: The replica's id; one that is not known changes nothing.
        """
        home = self._replicas.get(replica)
        if home is None:
            return
        before: _Known | None = None
        for key in self._keys(request):
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = _Known(home)
                if before is not None:
                    before.continuations += 1
            known.replica, before = home, known
            self._known.move_to_end(key)
        while len(self._known) > self.config.max_keys:
            self._known.popitem(last=False)

    def overloaded(self, replica: str) -> bool:
        """Returns whether a replica is so busy that conversations move away from it."""
        return self._overloaded(self._replicas[replica].load)

    def _draw(self) -> list[_Replica]:
        """Draws two different replicas, or the only one."""
        count = len(self._drawn_from)
        first = self._random.randrange(count)
        if count == 1:
            return [self._drawn_from[first]]
        second = self._random.randrange(count - 1)
        return [self._drawn_from[first], self._drawn_from[second + (second >= first)]]

    def _overloaded(self, load: ReplicaLoad) -> bool:
        config, others = self.config, len(self._drawn_from) - 1
        if not others:
            return False
        queue, pages = (self._queue - load.queue) / others, (self._pages - load.pages) / others
        return (
            load.queue > config.queue_factor * queue + config.queue_slack
            or config.pages_full < load.pages > pages + config.pages_slack
        )

    def _home(self, keys: list[bytes]) -> _Replica | None:
        """Returns the replica that the longest known key leads to; None if it leads nowhere."""
        for key in reversed(keys):
            known = self._known.get(key)
            if known is not None and known.replica.alive:
                return known.replica if known.continuations <= self.config.max_continuations else None
        return None

    def _keys(self, request: Routed) -> list[bytes]:
        """Returns the keys of a request, that of the shortest prefix first."""
        root = [request.cache_salt, request.model if self.config.per_model else "", request.conversation]
        key = _digest(repr(root).encode())
        if request.conversation:
            return [key]
        keys = []
        for piece in request.pieces:
            key = _digest(key + (piece if isinstance(piece, bytes) else piece.encode(errors="surrogatepass")))
            keys.append(key)
        return keys


def _digest(text: bytes) -> bytes:
    """Returns 8 bytes; should two prompts ever have the same, one of them is routed to the wrong replica, no more."""
    return hashlib.blake2b(text, digest_size=8).digest()
