"""Measures our own engine, peers and the simulator, and plots the results. A peer is another LLM server.

Owns: the load generator, reports, and the files that peers read.
Takes: a config of configs/bench.py or configs/simulate.py. Gives: report.json, a PNG, one line of JSON.
Parts: a module with a function `run` for each command of launch/bench.py.
"""
