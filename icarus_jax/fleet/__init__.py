"""Several replicas of one engine: which of them answers a request. No JAX.

Owns: the routing policy, and what it remembers of conversations.
Takes: the replicas' loads, and of each request its conversation or the beginning of its prompt. Gives: a replica.
Parts: Router, Routed, ReplicaLoad and RoutingConfig (routing).
"""
