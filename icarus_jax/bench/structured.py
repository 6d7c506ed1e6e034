"""`bench.py structured`: what it costs that answers follow a JSON schema.

Three figures. Tokens a second with a schema and without, at several batch sizes: the two take turns, because a machine
that others use too may be slow for seconds at a time, and the medians over the rounds count. The time to make the mask
of one token, along random answers. And the time to compile schemas of real life, each for the first time.
"""

from __future__ import annotations

import collections
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax import cli
from icarus_jax.bench.schemas import read_schemas
from icarus_jax.bench.step import WARM, Decoding
from icarus_jax.errors import RequestError
from icarus_jax.grammar.compiler import Compiler, Grammar, fill_masks
from icarus_jax.grammar.spec import GrammarSpec

if TYPE_CHECKING:
    from icarus_jax.engine.engine import Engine

ROUNDS = 5
MOST_SCHEMAS = 100
MASKED_TOKENS = 200  # of each random answer
# Its answers do not end within a run.
SCHEMA = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["river", "city", "country"]},
            "population": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        },
        "required": ["name", "kind", "population", "tags"],
        "additionalProperties": False,
    },
}


def decode_rates(
    engine: Engine, grammar: Grammar, sizes: Sequence[int], context: int, steps: int
) -> list[dict[str, float]]:
    """Measures the trunk's decode steps with a grammar and without, in turns.

    Args:
        engine: the engine, whose thread has not been started.
        grammar: what the answers follow.
        sizes: the batch sizes.
        context: tokens of each prompt.
        steps: how many steps to time in each round.

    Returns:
        For each batch size the median tokens a second of `free` and of `bound` answers, and `ratio`, the median of
        bound / free over the rounds.
    """
    trunk = next(iter(engine.models))
    rows = []
    for size in sizes:
        rates: dict[str, list[float]] = {"free": [], "bound": []}
        for turn in range(ROUNDS + 1):  # the first round compiles and does not count
            for kind, found in rates.items():
                bound = grammar if kind == "bound" else None
                batch = Decoding(engine, [trunk] * size, context, steps + WARM, bound)
                batch.time_steps(WARM)
                seconds = batch.time_steps(steps).sum()
                batch.close()
                if turn:
                    found.append(size * steps / seconds)
        ratio = float(np.median(np.divide(rates["bound"], rates["free"])))
        rows.append({"sequences": size, **{k: float(np.median(v)) for k, v in rates.items()}, "ratio": ratio})
    return rows


def mask_times(grammars: Iterable[Grammar], vocab_size: int, tokens: int) -> np.ndarray:
    """Measures how long the mask of each token of random answers takes, one at a time.

    Args:
        grammars: what the answers follow, one answer each.
        vocab_size: V.
        tokens: how many tokens of each answer there are at most.

    Returns:
        float64[N]: seconds.
    """
    pick, times = random.Random(0), []
    mask = np.zeros((1, -(-vocab_size // 32)), np.int32)
    for grammar in grammars:
        matcher = grammar.start()
        for _ in range(tokens):
            begin = time.perf_counter()
            fill_masks([(0, matcher)], mask)
            times.append(time.perf_counter() - begin)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size])
            matcher.accept(int(pick.choice(allowed)))
            if matcher.ended:
                break
    return np.array(times)


def compile_all(compiler: Compiler, schemas: Sequence[dict[str, Any]]) -> tuple[list[Grammar], np.ndarray, list[str]]:
    """Compiles schemas, each for the first time.

    Args:
        compiler: a compiler that has compiled something, so that its processes run.
        schemas: the schemas.

    Returns:
        The grammars; float64[N]: the seconds of each schema, refused ones too; why each of those was refused.
    """
    grammars, times, refused = [], [], []
    for schema in tqdm(schemas, disable=None, leave=False):
        begin = time.perf_counter()
        try:
            grammars.append(compiler.compile(GrammarSpec.json_schema(schema, "schema")))
        except RequestError as error:
            refused.append(str(error)[:200])
        times.append(time.perf_counter() - begin)
    return grammars, np.array(times), refused


def spread(seconds: np.ndarray) -> dict[str, float]:
    """Returns milliseconds: the median, the 99th percentile and the most."""
    if not len(seconds):
        return {}
    p50, p99, most = np.percentile(seconds * 1e3, [50, 99, 100])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": float(most)}


def run(
    config: ConfigDict, sizes: Sequence[int], context: int, steps: int, paths: Sequence[str], out: Path
) -> dict[str, Any]:
    """Runs the command: prints and saves the figures.

    Args:
        config: a config for serving. Its engine is made large enough for the batches; its heads are left out.
        sizes: the batch sizes.
        context: tokens of each prompt.
        steps: how many decode steps to time in each round.
        paths: the files and folders with schemas to compile; none: this server's own requests.
        out: the file for the figures.

    Returns:
        The figures.
    """
    from icarus_jax.server.structured import make_compiler

    with config.unlocked():
        config.heads = {}
        length = context + steps + WARM + 2 * max(sizes) + 16
        config.engine.max_num_seqs = max(sizes)
        config.engine.max_model_len = max(config.engine.max_model_len, length)
        config.engine.num_pages = max(config.engine.num_pages, max(sizes) * -(-length // config.engine.page_size))
    schemas = read_schemas(paths, MOST_SCHEMAS)
    app = cli.build(config)
    compiler, vocab_size = make_compiler(app.engine, app.tokenizer, app.eos_ids), app.engine.model_config.vocab_size
    grammar = compiler.compile(GrammarSpec.json_schema(SCHEMA, "schema"))
    grammars, compiled, refused = compile_all(compiler, schemas)
    masks = mask_times([grammar, *grammars], vocab_size, MASKED_TOKENS)
    report: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "compile": {"schemas": len(schemas), "refused": len(refused), **spread(compiled)},
        "refusals": dict(collections.Counter(refused).most_common()),
        "mask": {"tokens": len(masks), **spread(masks)},
        "context": context,
        "decode": decode_rates(app.engine, grammar, sizes, context, steps),
    }
    print(f"compile: {report['compile']}\nmask of a token: {report['mask']}")
    print(f"{'S':>4}{'free tok/s':>12}{'bound tok/s':>13}{'ratio':>8}")
    for row in report["decode"]:
        print(f"{row['sequences']:>4}{row['free']:>12.1f}{row['bound']:>13.1f}{row['ratio']:>8.3f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1))
    return report
