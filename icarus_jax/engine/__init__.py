"""The step: schedule, prepare, launch, sample, commit, on one thread; the compiled programs; several processes.

Owns: the device's weights and KV pages, buckets and their programs, the sampler.
Takes: a `Request` and a callback. Gives: `TokenOutput` to the callback, as the steps make them.
Parts: Engine (engine), Stepper (stepper), StepThread (step_thread), EngineStats (stats), Runner (runner), StepBatch
(step_batch), next_inputs (repeat), Programs (programs), make_buckets (buckets), sample (sampler), Worker (multihost).
"""
