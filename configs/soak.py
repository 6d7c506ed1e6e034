"""A server at twice the load that it can carry: eight heads, a reload every 5 s, a tenth of the clients leave.

    python launch/bench.py soak                              30 minutes
    python launch/bench.py soak --config.seconds=60

Prints a line a minute, and at the end one line of JSON: answers that were right and wrong, refusals (429), latencies of
the admitted requests, the server's memory a minute, and the pages that are still held.
"""

from ml_collections import ConfigDict

from icarus_jax.cli import serving_config


def get_config(arg: str = "") -> ConfigDict:
    """Takes no argument."""
    if arg:
        raise ValueError(f"soak.py takes no argument, but got {arg!r}")
    config = ConfigDict()
    config.trunk = serving_config().trunk
    config.seconds = 1800.0
    config.clients = 32  # that ask at once while the rate at saturation is measured
    config.max_tokens = 16
    config.engine = ConfigDict({"num_pages": 512, "max_num_seqs": 16, "max_model_len": 512})
    config.server = ConfigDict({"max_waiting_requests": 64})
    config.log = "soak-server.log"
    return config.lock()
