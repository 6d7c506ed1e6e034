"""Agent sessions as data: which calls are made when, and of which model. No JAX.

Owns: generators and the file form of sessions, arrivals, and the record of a call.
Takes: a workload's name and numbers. Gives: sessions of calls, each with token ids.
Parts: Session files, assignments and arrivals (workload), the agents' patterns (agents), Call and its summary (calls).
"""
