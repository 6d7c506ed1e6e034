"""The step: schedule, prepare, execute, commit, on one thread; the compiled programs; runs of several processes.

Owns: the device's weights and KV pages, buckets and their programs, the sampler.
Takes: a `Request` and a callback. Gives: `TokenOutput` to the callback, as the steps make them.
Parts: Engine (engine), StepThread (step_thread), EngineStats (stats), Runner (runner), StepBatch (step_batch), Programs
(programs), sample (sampler).
"""
