"""Benchmarks. The last line that each of them prints is one line of JSON.

    python launch/bench.py step --config=multi.py:8      times a decode step and prefill, and the machine's lower bound
    python launch/bench.py serve                         agents against our server: a shared KV cache, or one per model
    python launch/bench.py serve --config=bench.py:once  24 sessions at once; with --config.url=... against a peer
    python launch/bench.py peers --config=multi.py:8     writes trunk and heads as files for vLLM and llama.cpp
    python launch/bench.py prefix                        the prefill saved if eight heads take turns in a conversation
    python launch/bench.py fanout --config=multi.py:8    one prompt for eight heads, against eight isolated requests
    python launch/bench.py restart --prompt=1500         an engine that is started anew: with a page store, and without
    python launch/bench.py host --sequences=32,256,1024 --context=2048   the host's work of a step, without a device
    python launch/bench.py structured --sequences=1,8,24 --schemas=FILE,FOLDER   what it costs to follow JSON schemas
    python launch/bench.py soak                          twice the load that the server can carry, with reloads
    python launch/bench.py cpu                           the CPU kernels against XLA's programs
    python launch/bench.py kernels                       instruction bundles of the TPU kernels; no TPU is needed
    python launch/bench.py heads --answers=FILE,FILE --models=A,B --baseline=C,D   compares what evaluate.py has scored
    python launch/bench.py loss --config=single.py --texts=FILE,FILE --tokens=50000   the trunk's loss on texts
    python launch/bench.py simulate --config=simulate.py:llama8b_a100    `serve`, SIMULATED on other chips
    python launch/bench.py fleet                         how many chips a fleet of replicas needs, SIMULATED
    python launch/bench.py calibrate                     compares the simulator with what `serve` has measured here
    python launch/bench.py replicas                      compares the simulated fleet with three real replicas

configs/bench.py, configs/simulate.py and configs/fleet.py describe the options.
"""

import json
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict

from icarus_jax import cli

_SEQUENCES = flags.DEFINE_list("sequences", ["1", "8", "32"], "step: batch sizes")
_CONTEXT = flags.DEFINE_integer("context", 512, "step: tokens of each sequence")
_STEPS = flags.DEFINE_integer("steps", 10, "step: steps timed in each round")
_PROMPT = flags.DEFINE_integer("prompt", 2000, "fanout, restart: tokens of the prompt")
_OUTPUT = flags.DEFINE_string("output", "results/peers", "peers: the folder to write")
_SCHEMAS = flags.DEFINE_list("schemas", [], "structured: files and folders with JSON schemas; none: our own requests'")
_REPORT = flags.DEFINE_string("report", "results/structured.json", "structured: the file for the figures")
_ANSWERS = flags.DEFINE_list("answers", [], "heads: files that launch/evaluate.py has written")
_MODELS = flags.DEFINE_list("models", [], "heads: the models to compare")
_BASELINE = flags.DEFINE_list("baseline", [], "heads: the models that they are compared with")
_TEXTS = flags.DEFINE_list("texts", [], "loss: files with texts, .jsonl or plain")
_TOKENS = flags.DEFINE_integer("tokens", 50000, "loss: tokens to predict, at most")
_HEADS = cli.define_heads()


def bench_step(config: ConfigDict) -> dict:
    """Times decode steps and prefill of the trunk and its heads."""
    from icarus_jax.bench import step

    cli.add_heads(config, _HEADS.value or [])
    return step.run(config, [int(s) for s in _SEQUENCES.value], _CONTEXT.value, _STEPS.value)


def bench_host(config: ConfigDict) -> dict:
    """Times the host's work of decode steps, with a double in the device's place."""
    from icarus_jax.bench import host

    return host.run(config, [int(s) for s in _SEQUENCES.value], _CONTEXT.value, _STEPS.value)


def bench_structured(config: ConfigDict) -> dict:
    """Measures what it costs that answers follow a JSON schema."""
    from icarus_jax.bench import structured

    sizes = [int(s) for s in _SEQUENCES.value]
    return structured.run(config, sizes, _CONTEXT.value, _STEPS.value, _SCHEMAS.value, Path(_REPORT.value))


def bench_serve(config: ConfigDict) -> dict:
    """Runs agent sessions against servers."""
    from icarus_jax.bench import serve

    return serve.run(config)


def bench_calibrate(config: ConfigDict) -> dict:
    """Compares the simulator with what `bench.py serve` has measured on this machine."""
    from icarus_jax.bench import calibrate

    return calibrate.run(config)


def bench_replicas(config: ConfigDict) -> dict:
    """Compares the simulated fleet with real replicas on this machine."""
    from icarus_jax.bench import replicas

    return replicas.run(config)


def write_peers(config: ConfigDict) -> dict:
    """Writes the trunk and its heads as files for vLLM and llama.cpp."""
    from icarus_jax.bench import peer_files

    cli.add_heads(config, _HEADS.value or [])
    return peer_files.run(config, Path(_OUTPUT.value))


def bench_heads(config: ConfigDict) -> dict:
    """Compares heads by the scores of their answers."""
    from icarus_jax.bench import compare_heads
    from icarus_jax.errors import UsageError

    if not (_ANSWERS.value and _MODELS.value and _BASELINE.value):
        raise UsageError("give --answers=FILE,.. --models=NAME,.. --baseline=NAME,..")
    return compare_heads.run(_ANSWERS.value, _MODELS.value, _BASELINE.value)


def bench_loss(config: ConfigDict) -> dict:
    """Measures how well the trunk predicts texts."""
    from icarus_jax.bench import loss

    return loss.run(config, _TEXTS.value, _TOKENS.value)


def bench_simulate(config: ConfigDict) -> dict:
    """Simulates agent sessions on other chips."""
    from icarus_jax.bench import simulate

    return simulate.run(config)


def bench_fleet(config: ConfigDict) -> dict:
    """Simulates fleets of replicas."""
    from icarus_jax.bench import fleet

    return fleet.run(config)


def bench_fanout(config: ConfigDict) -> dict:
    """Compares one request for eight shared heads with eight requests to isolated heads."""
    from icarus_jax.bench import fanout

    return fanout.run(config, _PROMPT.value, _STEPS.value)


def bench_restart(config: ConfigDict) -> dict:
    """Compares an engine that finds its pages in a store with one that has to compute them."""
    from icarus_jax.bench import restart

    return restart.run(config, _PROMPT.value)


def bench_soak(config: ConfigDict) -> dict:
    """Runs `bench.py soak`."""
    from icarus_jax.bench import soak

    return soak.run(config)


def bench_cpu(config: ConfigDict) -> dict:
    """Times the CPU kernels against XLA's programs."""
    from icarus_jax.bench import cpu_kernels

    return cpu_kernels.run("smollm2-135m")


def bench_kernels(config: ConfigDict) -> dict:
    """Counts the instruction bundles of the TPU kernels."""
    from icarus_jax.bench import kernels

    return kernels.run(config)


# name -> (the function to run, its default config)
COMMANDS = {
    "step": (bench_step, "multi.py:8"),
    "host": (bench_host, "multi.py"),
    "structured": (bench_structured, "multi.py"),
    "serve": (bench_serve, "bench.py"),
    "prefix": (bench_serve, "bench.py:prefix"),
    "calibrate": (bench_calibrate, "bench.py"),
    "replicas": (bench_replicas, "bench.py:replicas"),
    "peers": (write_peers, "multi.py:8"),
    "fanout": (bench_fanout, "multi.py:8"),
    "restart": (bench_restart, "multi.py:2"),
    "heads": (bench_heads, "multi.py"),
    "loss": (bench_loss, "single.py"),
    "soak": (bench_soak, "soak.py"),
    "cpu": (bench_cpu, "single.py"),
    "kernels": (bench_kernels, "single.py"),
    "fleet": (bench_fleet, "fleet.py"),
    "simulate": (bench_simulate, "simulate.py:llama8b_a100"),
}


def run() -> None:
    """Reads the command and the flags, and runs the benchmark; also the console script icarus-bench."""
    command = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "step"
    if command not in COMMANDS:
        sys.exit(f"bench.py: no benchmark {command!r}; there is {', '.join(COMMANDS)}")
    sys.argv[0] += f" {command}"  # reports contain the command line
    measure, default_config = COMMANDS[command]

    def main(config: ConfigDict) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers that we started are stopped
        print(json.dumps(measure(config)))

    cli.run(main, default_config)


if __name__ == "__main__":
    run()
