"""Recommends how to serve a PEFT adapter: shared (ICaRus), activated (aLoRA) or isolated (an ordinary LoRA).

    python launch/check.py --head=heads/sql --config.task=sql --config.data.path=geography_dev.jsonl

The engine answers rows of the adapter's own task under each kind. Printed are for each kind the loss in nats per
completion token, how far the greedy answers agree with those of `isolated`, which are the adapter's own as in PEFT, and
how many answers are exactly right. The last line on stdout is one JSON object with the figures and the recommendation.
"""

import dataclasses
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict

from icarus_jax import cli
from icarus_jax.errors import UsageError, usage_errors
from icarus_jax.tasks import TASKS

_HEAD = flags.DEFINE_string("head", None, "the adapter: a PEFT folder, or random:SEED")


def main(config: ConfigDict) -> None:
    """Measures the adapter under each kind, and prints the figures and a recommendation."""
    if not _HEAD.value:
        raise UsageError("--head=DIR is missing: the adapter to check")
    if config.task and config.task not in TASKS:
        raise UsageError(f"--config.task={config.task}: no such task; the tasks are {', '.join(TASKS)}")
    from icarus_jax.evaluation import kind_check
    from icarus_jax.training import data
    from icarus_jax.weights import peft

    app = cli.build(config)
    encoder = data.Encoder(app.tokenizer, app.eos_ids, app.engine.config.max_model_len - 1)
    with usage_errors():
        adapter = peft.load_adapter(_HEAD.value, app.engine.model_config)
        adapter.check("isolated", app.loader.trunk_identity)
        path = Path(config.data.path).expanduser()
        rows = data.read_examples(path, encoder, TASKS.get(config.task), skip_long=True)
        examples = [example for example in rows if example][: config.limit or None]
        if config.invocation:
            invocation = tuple(app.tokenizer(config.invocation, add_special_tokens=False)["input_ids"])
        else:
            invocation = adapter.invocation_tokens or kind_check.invocation_of(examples)
        models = kind_check.load_kinds(app.engine, adapter, invocation)
    app.start()
    found = kind_check.measure(app.engine, models, examples)
    reports = {kind: found[model] for kind, model in zip(kind_check.KINDS, models, strict=True)}
    kind_check.table(reports, print)
    kind, why = kind_check.recommend(reports)
    print(f"recommended: {kind} ({why})")
    figures = {name: dataclasses.asdict(report) for name, report in reports.items()}
    print(json.dumps({"head": _HEAD.value, "rows": len(examples), "recommended": kind, "kinds": figures}))
    app.engine.shutdown()


def run() -> None:
    """Reads the flags and runs the program; also the console script icarus-check."""
    cli.run(main, "check.py")


if __name__ == "__main__":
    run()
