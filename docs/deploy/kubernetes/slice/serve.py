"""The config of every host of a slice; the ConfigMap mounts it as /config/serve.py.

icarus-serve --config=/config/serve.py

What is not set here is icarus_jax/cli/defaults.py's; a flag --config.KEY=VALUE in the manifest's args overrides both.
"""

from ml_collections import ConfigDict

from icarus_jax import cli


def get_config() -> ConfigDict:
    """Makes the config: a trunk of 70B parameters from a bucket, on 16 chips.

    The pods' service account must be allowed to read the bucket. Heads are added with config.heads.update(NAME={"path":
    FOLDER, "kv": "shared"}); every host reads the folder, so that it lies in a volume that all of them mount.
    """
    config = cli.serving_config()
    config.trunk.update(source="gs://BUCKET/llama-3.1-70b", name="llama-3.1-70b")
    config.engine.update(dtype="bfloat16", kv_dtype="bfloat16", mesh="1x16", page_size=64, num_pages=2048)
    config.engine.update(max_num_seqs=64, max_model_len=8192)
    config.server.update(host="0.0.0.0", port=8000)
    # The manifest's terminationGracePeriodSeconds is longer than this.
    config.server.drain_seconds = 120.0
    return config.lock()
