"""Serves the double with a folder of batches, in a process of its own: for tests that kill it.

python -m tests.evaluation.served_batches PORT FOLDER STEP_SECONDS
"""

from __future__ import annotations

import sys
from pathlib import Path

from icarus_jax.evaluation.batch_routes import BatchRoutes
from icarus_jax.evaluation.batch_store import BatchStore
from icarus_jax.evaluation.batch_worker import BatchWorker
from icarus_jax.server.app import create_app, run
from icarus_jax.server.head_loader import HeadLoader
from tests import doubles


def main(port: int, folder: Path, step_seconds: float) -> None:
    tokenizer = doubles.byte_level_tokenizer()
    engine = doubles.FakeEngine(len(tokenizer), (), step_seconds)
    engine.start()
    worker = BatchWorker(BatchStore(folder), 2)
    app = create_app(
        engine, tokenizer, (), HeadLoader(engine, "trunk"), extra=[BatchRoutes(worker)], lifespan=worker.lifespan
    )
    run(app, engine, "127.0.0.1", port)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
