"""Simulation of serving on chips that we do not have: the real scheduler, with a roofline model as the device. No JAX.

Owns: public peak rates of chips, and a step's time from its bytes and FLOPs.
Takes: a model's sizes, a chip, a workload. Gives: latencies and throughput under a virtual clock, all SIMULATED.
Parts: Chip (chips), Roofline and Assumptions (roofline), Simulation (run).
"""
