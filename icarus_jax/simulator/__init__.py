"""Simulation of serving on chips that we do not have: the real scheduler, with a roofline model as the device. No JAX.

Owns: public peak rates of chips, a step's time from its bytes and FLOPs, and a coarser replica for fleets of many.
Takes: a model's sizes, a chip, a workload. Gives: latencies and throughput under a virtual clock, all SIMULATED.
Parts: Chip (chips), Precision (precision), Roofline and Assumptions (roofline), Simulation (run); FleetSimulation
(fleet) of FleetConfig (fleet_config) and Replica (replica), with the real router; the duration of its steps
(step_times), its traffic and page store (traffic).
"""
