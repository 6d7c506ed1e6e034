"""Serves the trunk and its heads over the OpenAI-compatible HTTP API.

    python launch/serve.py --config=multi.py

SIGTERM or Ctrl-C lets running requests finish, then stops.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from icarus_jax import cli

_HEADS = cli.define_heads()


def main(config: ConfigDict) -> None:
    cli.add_heads(config, _HEADS.value or ())
    app = cli.build(config)
    from icarus_jax import server

    sources = {config.trunk.name: config.trunk.source} | {name: head.path for name, head in config.heads.items()}
    app.start()
    api = server.create_app(app.engine, app.tokenizer, app.eos_ids, config.trunk.name, sources)
    server.run(api, app.engine, config.server.host, config.server.port)


if __name__ == "__main__":
    cli.run(main, default_config="multi.py")
