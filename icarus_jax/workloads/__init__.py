"""Agent sessions as data: what is asked when, by which model. Knows no JAX.

Owns: generators and the file form of sessions, arrivals, and the record of a call.
Takes: a workload's name and numbers. Gives: sessions of calls, each with token ids.
Parts: Session files, assignments and arrivals (workload), the agents' patterns (agents), Call and its summary (calls).
"""
