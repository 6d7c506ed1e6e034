"""Measurements of our own engine, of peers and of the simulator, and their plots.

Owns: the load generator, reports, and the files that peers read.
Takes: a config of configs/bench.py or configs/simulate.py. Gives: report.json, a PNG, one line of JSON.
Parts: one module a command of launch/bench.py, each with `run(config)`.
"""
