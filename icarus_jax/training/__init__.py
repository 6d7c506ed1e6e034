"""Training heads on the frozen trunk's K/V (the paper's two streams).

Owns: the packed batches, the loss and its step, checkpoints of a run, its log and plots.
Takes: a config of configs/train.py and JSONL data. Gives: an adapter in a PEFT folder.
Parts: run (loop), Trainer (trainer), Data (corpus), Encoder and Example (data), Batch (packing), Method (heads),
token_logprobs (two_stream), train_step and validate (step).
"""
