"""The server's config on Kubernetes; the ConfigMap mounts it as /config/serve.py.

icarus-serve --config=/config/serve.py

What is not set here is icarus_jax/cli/defaults.py's; a flag --config.KEY=VALUE in the manifest's args overrides both.
"""

from ml_collections import ConfigDict

from icarus_jax import cli


def get_config() -> ConfigDict:
    """Makes the config: the default trunk with the trained heads, as configs/multi.py has them."""
    config = cli.serving_config()
    config.heads.update(cli.trained_heads())
    config.server.update(host="0.0.0.0", port=8000)
    # The manifest's terminationGracePeriodSeconds is longer than this.
    config.server.drain_seconds = 120.0
    return config.lock()
