"""Training heads on the frozen trunk's K/V (the paper's two streams).

Owns: the packed batches, the loss and its step, checkpoints of a run, its log and plots.
Takes: a config of configs/train.py and JSONL data. Gives: an adapter in a PEFT folder.
Parts: run (loop), Encoder and Example (data), train_step and validate (step).
"""
