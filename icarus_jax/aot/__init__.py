"""Programs compiled ahead of time for chips that we do not have, and what they would cost.

Owns: topologies, the accounts of a compiled program's memory traffic, copies and collectives.
Takes: a config and a topology's name. Gives: a table of programs, memory and rooflines.
Parts: find_topology (topology), Check (check), run (report), account (cost).
"""
