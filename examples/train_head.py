"""Trains a head on your own data and asks it.

    python examples/train_head.py my.jsonl "A question of the kind that my.jsonl has"

Each line of the file is {"messages": [...]} as OpenAI's fine-tuning takes it, or {"prompt": ..., "completion": ...}.
The head lies in runs/mine-shared-s0/heads/mine as a PEFT folder.
"""

import sys
from pathlib import Path

from icarus_jax import LLM, SamplingParams
from icarus_jax.cli import load_config
from icarus_jax.training import loop


def main(
    data: str, question: str, steps: int = 100, rows: int = 8, output: str = "", trunk: str = "", **engine
) -> None:
    config = load_config("train.py:mine")
    with config.unlocked():
        config.data.path, config.data.rows, config.optimiser.steps = data, rows, steps
        config.output = output  # the default: runs/mine-shared-s0
        config.trunk.source = trunk or config.trunk.source
    (head,) = loop.run(config)
    print(f"trained: {Path(head).name}")
    with LLM(config.trunk.source, {"mine": str(head)}, **engine) as llm:
        params = SamplingParams(temperature=0, max_tokens=32)
        (answer,) = llm.chat([{"role": "user", "content": question}], "mine", params)
        print(f"mine: {answer.outputs[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
