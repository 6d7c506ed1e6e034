"""Writes what the trunk itself answers: the text that holds a tuned trunk near the original (configs/train.py).

    python examples/own_chats.py chats.jsonl math tools
    python launch/train.py --config=train.py:intent,slots --config.trunk.tune=True --config.trunk.text=chats.jsonl

The prompts are rows of the training files of these tasks, at even distances.
"""

import json
import sys
from pathlib import Path

from icarus_jax import LLM, SamplingParams
from icarus_jax.cli import DATA
from icarus_jax.tasks import TASKS


def main(out: str, *tasks: str, rows: int = 200, length: int = 144, folder: Path = DATA, **engine) -> None:
    """Writes at most `rows` chats of each task to `out`, each of at most `length` tokens."""
    asked = []
    for name in tasks:
        lines = (folder / TASKS[name].train_file).read_bytes().splitlines()
        asked += [TASKS[name].prompt(json.loads(line)) for line in lines[:: max(1, len(lines) // rows)][:rows]]
    with LLM(**engine) as llm:
        # Half of the length is for the prompt, so that no answer is cut to fit a packed row.
        prompts = [chat for chat in asked if len(_ids(llm, chat)) <= length // 2]
        params = SamplingParams(temperature=0.7, max_tokens=length // 2, seed=0)
        with open(out, "w") as file:
            for prompt, answer in zip(prompts, llm.chat(prompts, sampling_params=params), strict=True):
                if text := answer.outputs[0].text.strip():
                    chat = [*prompt, {"role": "assistant", "content": text}]
                    file.write(json.dumps({"messages": chat}) + "\n")
    print(f"{out}: {len(prompts)} prompts of {len(asked)}")


def _ids(llm: LLM, chat: list[dict]) -> list[int]:
    return llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
