"""Serves the trunk and its heads over the OpenAI-compatible HTTP API.

    python launch/serve.py --config=multi.py

On SIGTERM or Ctrl-C it stops, after the running requests have finished. A second signal stops it at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from icarus_jax import cli
from icarus_jax.errors import usage_errors

if TYPE_CHECKING:
    from icarus_jax.evaluation.batch_worker import BatchWorker

_HEADS = cli.define_heads()


def main(config: ConfigDict) -> None:
    """Builds the engine and serves until a signal comes."""
    cli.add_heads(config, _HEADS.value or ())
    keys, limits = cli.access(config.server)
    cli.check_adapters(config)
    traces = cli.tracing(config.server.otlp_traces_endpoint)
    app = cli.build(config)
    from icarus_jax.evaluation.batch_routes import BatchRoutes
    from icarus_jax.server import access_log
    from icarus_jax.server import app as server

    if config.server.access_log:
        access_log.write_to_stdout()
    watcher = cli.watching(app.loader, config.server.watch_heads)
    worker = batches(config.server.batch_folder, app.engine.config.max_num_seqs)
    lifespan = worker.lifespan if worker else None
    app.start()
    api = cli.make_api(config, app, keys, limits, traces, extra=[BatchRoutes(worker)], lifespan=lifespan)
    with watcher:
        server.run(api, app.engine, config.server.host, config.server.port, config.server.drain_seconds)


def batches(folder: str, max_num_seqs: int) -> BatchWorker | None:
    """Makes what runs the batches of /v1/batches.

    Args:
        folder: Where files and answers are kept; a relative path is relative to the working directory. '': there are
            no batches.
        max_num_seqs: How many sequences can run at once. Batches get half of them: clients that wait come first.

    Raises:
        UsageError: The folder cannot be used.
    """
    import jax

    if not folder or jax.process_index() > 0:  # of several processes, the first one answers requests
        return None
    from icarus_jax.evaluation.batch_store import BatchStore
    from icarus_jax.evaluation.batch_worker import BatchWorker

    with usage_errors("config.server.batch_folder"):
        store = BatchStore(Path(folder).expanduser())
    return BatchWorker(store, max(1, max_num_seqs // 2))


def run() -> None:
    """Reads the flags and runs the program; also the console script icarus-serve."""
    cli.run(main, default_config="multi.py")


if __name__ == "__main__":
    run()
