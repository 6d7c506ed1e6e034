"""Ray Serve's request router, with the routing policy of icarus_jax.fleet inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from icarus_jax.fleet.routing import ReplicaLoad, Router, RoutingConfig
from icarus_jax.on_ray.asked import Asked, Prompt


class ConversationRouter(RequestRouter):
    """Sends a request to the replica that has the pages of its conversation, unless that one is overloaded.

    Every handle to a deployment has a router of its own, so one front remembers the conversations of all its clients.
    """

    def initialize_state(self, **settings: Any) -> None:
        """Starts without replicas and conversations. Ray Serve calls it.

        Args:
            **settings: fields of RoutingConfig.
        """
        self._policy = Router(RoutingConfig(**settings))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Takes the replicas that run, and forgets those that do not any more. Ray Serve calls it.

        Args:
            replicas: all that run.
        """
        super().update_replicas(replicas)
        running = {name(replica) for replica in replicas}
        for gone in set(self._policy.replicas) - running:
            self._policy.remove(gone)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forgets a replica that has died. Ray Serve calls it.

        Args:
            replica_id: the replica's id.
        """
        super().on_replica_actor_died(replica_id)
        self._policy.remove(replica_id.unique_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Chooses replicas for a request. Ray Serve calls it again, after a while, if none of them takes the request.

        Args:
            candidate_replicas: the replicas that run.
            pending_request: the request.

        Returns:
            Replicas of which the first one that has room gets the request.
        """
        replicas = {name(replica): replica for replica in candidate_replicas}
        for replica in candidate_replicas:
            self._policy.update(self._load(replica))
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        asked = _asked(pending_request)
        if asked.replica in replicas:
            return [[replicas[asked.replica]]]
        return [[replicas[chosen]] for chosen in self._policy.choose(asked.routed) if chosen in replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Notes where a conversation goes on. Ray Serve calls it.

        Args:
            pending_request: the request.
            replica_id: the replica that has taken it.
            result: its answer to come.
        """
        self._policy.on_routed(_asked(pending_request).routed, replica_id.unique_id)

    def _load(self, replica: RunningReplica) -> ReplicaLoad:
        """Returns how busy a replica is.

        Its requests are those that this router has sent and that have not ended. What the replica says of itself is
        some seconds old; it counts where the router knows nothing.
        """
        stats = replica.routing_stats
        queue = self.replica_queue_len_cache.get(replica.replica_id)
        return ReplicaLoad(name(replica), stats.get("queue", 0) if queue is None else queue, stats.get("pages", 0.0))


def name(replica: RunningReplica) -> str:
    """Returns the id of a replica, as the policy knows it."""
    return replica.replica_id.unique_id


def _asked(pending: PendingRequest) -> Asked | Prompt:
    args: Sequence[Any] = pending.args
    return args[0] if args and isinstance(args[0], Asked | Prompt) else Asked({}, b"")
