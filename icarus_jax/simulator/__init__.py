"""Chips that are not here, under a virtual clock: the real scheduler with a roofline for a device. Knows no JAX.

Owns: public peak rates of chips, and a step's time from its bytes and FLOPs.
Takes: a model's sizes, a chip, a workload. Gives: latencies and throughput, all SIMULATED.
Parts: Chip (chips), Roofline and Assumptions (roofline), Simulation (run).
"""
