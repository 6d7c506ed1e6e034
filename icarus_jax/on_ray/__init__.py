"""What runs on Ray: replicas of the engine under Ray Serve, and batches under Ray Data.

Owns: the deployments, the request router that keeps conversations where their pages are, heads on all replicas, long
prompts computed by replicas of their own, the workers of a batch.
Takes: a config; HTTP requests, or the requests of an evaluation. Gives: answers.
Parts: application (serving), ask_on_workers (batches). Ray is optional: pip install 'icarus-jax[ray]'.
"""
