"""The step: plan, prepare, execute, commit, on one thread; the compiled programs, and several hosts.

Owns: the device's weights and KV pages, buckets and their programs, the sampler.
Takes: a `Request` and a callback. Gives: `TokenOutput` to the callback, as the steps make them.
Parts: Engine (engine), EngineStats (stats), Runner (runner), Programs (programs), sample (sampler).
"""
