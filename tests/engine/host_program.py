"""One process of a run on two hosts: it answers one prompt again and again, or is idle. See test_lost_hosts.py.

Process 0 prints a line for each answer: "answer", and as JSON the time, how long it took, and its tokens.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import app

from icarus_jax import LLM, SamplingParams, cli

PROMPT, TOKENS = list(range(40, 60)), 24


def main(argv: list[str]) -> None:
    settings = json.loads(argv[1])
    config = cli.serving_config()
    config.trunk.source = settings["trunk"]
    config.engine.update(settings["engine"])
    config.distributed.update(settings["distributed"])
    with LLM.from_config(config) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        while True:
            begin = time.time()
            (answer,) = llm.generate(PROMPT, sampling_params=params)
            seen = time.time(), time.time() - begin, answer.outputs[0].token_ids
            print("answer", json.dumps(seen), flush=True)
            while settings["idle"]:
                time.sleep(0.1)


if __name__ == "__main__":
    app.run(main)
