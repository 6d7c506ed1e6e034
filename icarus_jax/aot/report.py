"""The report of launch/compile_check.py: the programs, the memory that is left, and rooflines of decoding."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax import cli
from icarus_jax.aot.check import OWN_TOKENS, RESERVED, Check, Compiled, Plan
from icarus_jax.aot.topology import Topology, find_topology
from icarus_jax.config import EngineConfig, ModelConfig
from icarus_jax.errors import UsageError, usage_errors
from icarus_jax.models.presets import MODELS
from icarus_jax.weights import peft
from icarus_jax.weights.checkpoint import open_trunk
from icarus_jax.weights.sources import SIZES_ONLY

BATCHES = (1, 8, 32, 64)  # numbers of sequences in batch_lines
HEADS = (2, 4, 8)  # numbers of heads in heads_lines
MIB = 2**20


def make_plan(config: ConfigDict) -> Plan:
    """Makes the plan of what a config would serve, without reading weights.

    Args:
        config: A serving config.

    Returns:
        The plan.

    Raises:
        UsageError: A setting is wrong, or the trunk or an adapter cannot be read.
    """
    engine = cli.engine_config(config.engine)
    heads = list(config.heads.values())
    for name, head in config.heads.items():
        cli.check_head(name, head, config.trunk.name)
    with usage_errors("config.heads"):
        ranks = [peft.adapter_rank(cli.home_path(head.path)) for head in heads]
    with usage_errors():
        model = _model(config.trunk.source, engine)
    return Plan(model, engine, ranks, engine.writer_adapters or any(head.kv != "shared" for head in heads))


def _model(source: str, engine: EngineConfig) -> ModelConfig:
    if not source.startswith(SIZES_ONLY):
        return open_trunk(source, engine.dtype).config
    name = source.removeprefix(SIZES_ONLY)
    if name not in MODELS:
        raise ValueError(f"trunk {source!r}: no such model; there is {', '.join(MODELS)}")
    return MODELS[name]


def run(config: ConfigDict, topology_name: str, context: int, only: str) -> bool:
    """Compiles the programs and prints the report.

    Args:
        config: A serving config.
        topology_name: The devices; a name that `find_topology` takes.
        context: Tokens of each sequence in the rooflines. 0: half of engine.max_model_len.
        only: A regular expression: compile only the programs in whose name it is found.

    Returns:
        Whether every program compiles, fits in memory and updates the page pool in place.

    Raises:
        UsageError: A setting or an argument is wrong.
    """
    plan = make_plan(config)
    context = context or plan.engine.max_model_len // 2
    if not 1 <= context <= plan.engine.max_model_len - OWN_TOKENS:
        most = plan.engine.max_model_len - OWN_TOKENS
        raise UsageError(f"--context={context}: from 1 to {most}, as engine.max_model_len leaves it")
    with usage_errors():
        topology = find_topology(topology_name)
    with usage_errors(f"--topology={topology_name}"):
        check = Check(plan, topology)
    names = [name for name in check.jobs() if re.search(only, name)]
    if not names:
        raise UsageError(f"--only={only}: no such program; there is {', '.join(check.jobs())}")
    print("\n".join(head_lines(config.trunk.name, check, topology)))
    print(PROGRAM_HEAD)
    done = {}
    for name in tqdm(names, desc="compiling", unit="program", file=sys.stderr, disable=None, leave=False):
        done[name] = check.compile(name)
        tqdm.write(program_line(check, done[name]))
    print("\n".join(memory_lines(check, list(done.values()))))
    steps = {c.bucket: c for c in done.values() if c.bucket is not None and check.decodes(c.bucket)}
    working = {b: c for b, c in steps.items() if c.account.memory}
    if working:
        print("\n".join([*batch_lines(check, working, context), *heads_lines(check, working, context)]))
    complaints = [f"{c.name}: {c.complaint}" for c in done.values() if c.complaint]
    print(
        "\n".join(complaints) if complaints else f"all {len(done)} programs compile, fit and update the pages in place"
    )
    return not complaints


def head_lines(name: str, check: Check, topology: Topology) -> Iterator[str]:
    """Yields the first lines: what is served, where, and the memory of weights, adapters and pages on one device."""
    engine, chip = check.plan.engine, topology.chip
    kinds = f"{len(check.plan.ranks)} heads" + (", adapters on writers too" if check.plan.adapt_writers else "")
    weights = f"{engine.dtype}, weights {engine.weights}" if engine.weights else engine.dtype
    yield (
        f"{name} ({weights}, KV {engine.kv_dtype}, pages of {engine.page_size}, {kinds}) on {engine.mesh} of "
        f"{topology.name}, kernels: {check.programs.kernels}. COMPILED, NOT RUN."
    )
    yield (
        f"one device of {chip.memory / 1e9:.1f} GB: weights {check.weight_bytes / MIB:.0f} MiB, adapters "
        f"{check.adapter_bytes / MIB:.0f} MiB, "
        f"{engine.num_pages} pages {check.pool_bytes / MIB:.0f} MiB"
    )


PROGRAM_HEAD = (
    f"{'program':<38}{'weights':>9}{'pages':>8}{'temp MiB':>9}{'fits':>6}{'GFLOP':>9}{'MB moved':>10}{'x fewest':>9}"
    f"{'Mcycles':>9}{'launches':>9}  collectives"
)


def program_line(check: Check, done: Compiled) -> str:
    """Returns the line of a program, under PROGRAM_HEAD."""
    a, bucket = done.account, done.bucket
    pool = "page" in done.name or bucket is not None
    fewest = check.fewest_bytes(bucket, check.padded_pages(bucket)) if bucket else 0
    weights = (check.weight_bytes + check.adapter_bytes) / MIB if bucket else 0
    numbers = (
        f"{weights:>9.0f}{check.pool_bytes / MIB * pool:>8.0f}"
        f"{a.temporaries / MIB:>9.1f}{'NO' if done.complaint else 'yes':>6}"
    )
    moved = f"{a.flops / 1e9:>9.1f}{a.bytes / 1e6:>10.1f}" if check.counted else f"{'-':>9}{'-':>10}"
    ratio = f"{a.bytes / fewest:>9.3f}" if fewest and check.counted else f"{'-':>9}"
    collectives = ", ".join(f"{n} {kind}" for kind, n in a.collectives.items()) or "-"
    cycles = f"{a.cycles / 1e6:>9.2f}" if check.counted else f"{'-':>9}"
    launches = f"{a.launches:>9}" if bucket and check.programs.kernels == "gpu" else f"{'-':>9}"  # in each layer
    return f"{done.name:<38}{numbers}{moved}{ratio}{cycles}{launches}  {collectives}"


def memory_lines(check: Check, done: Sequence[Compiled]) -> Iterator[str]:
    """Yields how many pages fit beside the weights and these programs."""
    pages, engine = check.pages_that_fit(done), check.plan.engine
    yield (
        f"room for {pages} pages, {pages * engine.page_size} tokens of context ({RESERVED:.0%} of the memory kept "
        f"free); the config has {engine.num_pages}, {engine.num_pages * engine.page_size} tokens"
    )


def batch_lines(check: Check, steps: dict, context: int) -> Iterator[str]:
    """Yields a table of decoding at several batch sizes.

    Args:
        check: The programs.
        steps: The compiled decode steps by bucket.
        context: Tokens of each sequence.

    Yields:
        Lines of text.
    """
    yield f"\ndecode at {context} tokens each, roofline (peak rates: an upper bound, nothing was run):"
    yield f"{'sequences':>9} {'rows each':>9} {'GB moved':>9} {'x 1 row':>8} {'ms':>8} {'tokens/s':>9}"
    one_row: dict[int, float] = {}
    for bucket, done in steps.items():
        if bucket.writers not in BATCHES:
            continue
        pages = check.pages_of(bucket, 0, context, together=False)
        seconds = check.seconds(done, pages)
        rows, moved = 2 if bucket.readers else 1, check.step_bytes(done, pages) / 1e9
        ratio = moved / one_row.setdefault(bucket.writers, moved)
        yield (
            f"{bucket.writers:>9} {rows:>9} {moved:>9.3f} {ratio:>8.3f} {seconds * 1e3:>8.3f} "
            f"{bucket.writers / seconds:>9.0f}"
        )


def heads_lines(check: Check, steps: dict, context: int) -> Iterator[str]:
    """Yields a table of N heads that decode one sequence each on a common prefix.

    It compares heads that share the prefix's pages with N models that have K/V of their own.

    Args:
        check: The programs.
        steps: The compiled decode steps by bucket.
        context: Tokens of the prefix.

    Yields:
        Lines of text.
    """
    yield f"\nN heads on a prefix of {context} tokens, {OWN_TOKENS} own tokens each; apart: no page is shared:"
    yield f"{'N':>3} {'KV MB':>9} {'ms':>8} {'tokens/s':>9} {'apart: KV MB':>13} {'ms':>8} {'tokens/s':>9}"
    for bucket, done in steps.items():
        if bucket.writers not in HEADS or not bucket.readers:
            continue
        cells = []
        for together in (True, False):
            pages = check.pages_of(bucket, context, OWN_TOKENS, together)
            seconds = check.seconds(done, pages)
            cells += [pages * check.page_bytes / 1e6, seconds * 1e3, bucket.writers / seconds]
        yield "{:>3} {:>9.1f} {:>8.3f} {:>9.0f} {:>13.1f} {:>8.3f} {:>9.0f}".format(bucket.writers, *cells)
