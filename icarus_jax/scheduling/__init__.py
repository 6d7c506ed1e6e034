"""Sequences, pages, sessions and adapter slots: which sequences run in the next step, and on which pages. Without JAX.

Owns: the page pool and its prefix cache, the queue, the adapter slots, retained sessions.
Takes: `Request` with `SamplingParams` (request). Gives: a `StepPlan` a step (plan), and `TokenOutput` for each stream.
Parts: Scheduler (scheduler), PagePool (page_pool), AdapterSlots, Sessions, Registry and Model (registry), Sequence.
"""
