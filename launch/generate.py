"""Gives one prompt to several models and prints their answers side by side.

    python launch/generate.py --config=multi.py --prompt='The capital of France is' --max_tokens=8
    python launch/generate.py --config=multi.py:2 --prompt='Who are you?' --chat --models=h0,h1 --json

The prompt is taken as it is. With --chat it becomes a user's message in the model's chat template. The first model
fills the cache and the others start from it: each column shows how many of the prompt's tokens came from the cache.
With --json, stdout is one line:
{"prompt_ids", "models": [{"model", "text", "token_ids", "cached_tokens", "finish_reason"}, ...]}.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import textwrap
from pathlib import Path

if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from icarus_jax import cli
from icarus_jax.errors import UsageError
from icarus_jax.llm import LLM
from icarus_jax.scheduling.request import SamplingParams

if TYPE_CHECKING:
    from icarus_jax.server.offline import CompletionOutput, RequestOutput

_PROMPT = flags.DEFINE_string("prompt", None, "the prompt's text")
_PROMPT_IDS = flags.DEFINE_list("prompt_ids", None, "1,2,3: the prompt's token ids, instead of --prompt")
_CHAT = flags.DEFINE_bool("chat", False, "put --prompt into the chat template")
_MODELS = flags.DEFINE_list("models", None, "a,b: the models to ask (all)")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "tokens to generate at most")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token")
_SEED = flags.DEFINE_integer("seed", None, "of the random draws")
_JSON = flags.DEFINE_bool("json", False, "print one line of JSON")
_HEADS = cli.define_heads()

MIN_COLUMN = 32  # the least width of a column, in characters; models that do not fit go into another row of columns


def main(config: ConfigDict) -> None:
    """Asks the models and prints their answers."""
    cli.add_heads(config, _HEADS.value or ())
    config.engine.warmup = "off"  # a single prompt needs few of the programs
    models = pick_models(cli.served_names(config))
    params = SamplingParams(max_tokens=_MAX_TOKENS.value, temperature=_TEMPERATURE.value, seed=_SEED.value)
    prompt = parse_prompt()
    with LLM.from_config(config) as llm:
        if _CHAT.value and not llm.tokenizer.chat_template:
            raise UsageError("--chat: this trunk has no chat template; leave --chat out")
        if _CHAT.value:
            (answer,) = llm.chat([{"role": "user", "content": prompt}], models, params)
        else:
            (answer,) = llm.generate(prompt, models, params)
    if _JSON.value:
        print(json.dumps({"prompt_ids": answer.prompt_token_ids, "models": [shown(a) for a in answer.outputs]}))
    else:
        print("\n".join(side_by_side(answer, shutil.get_terminal_size().columns)))


def shown(answer: CompletionOutput) -> dict[str, object]:
    """Returns what --json prints of an answer."""
    keys = ("model", "text", "token_ids", "cached_tokens", "finish_reason")
    return {key: value for key, value in dataclasses.asdict(answer).items() if key in keys}


def pick_models(served: list[str]) -> list[str]:
    """Returns the models of --models; all if there are none.

    Raises:
        UsageError: One of them is not served.
    """
    for name in _MODELS.value or ():
        if name not in served:
            raise UsageError(f"--models: no model {name!r}; served are {', '.join(served)}")
    return list(dict.fromkeys(_MODELS.value or served))


def parse_prompt() -> str | list[int]:
    """Returns the text of --prompt, or the ids of --prompt_ids.

    Raises:
        UsageError: Not exactly one of them is given, or the ids are not numbers.
    """
    if (_PROMPT.value is None) == (_PROMPT_IDS.value is None):
        raise UsageError("give the prompt as either --prompt=TEXT or --prompt_ids=1,2,3")
    if _PROMPT.value is not None:
        return _PROMPT.value
    if _CHAT.value:
        raise UsageError("--chat needs --prompt=TEXT; token ids are taken as they are")
    words = _PROMPT_IDS.value or []
    try:
        return [int(word) for word in words]
    except ValueError:
        raise UsageError(f"--prompt_ids={','.join(words)}: not numbers like 1,2,3") from None


def side_by_side(answer: RequestOutput, width: int) -> list[str]:
    """Lays out the models' answers in columns, as many beside each other as fit.

    Args:
        answer: The answers.
        width: The width of the terminal in characters.

    Returns:
        The lines.
    """
    answers, prompt_len = answer.outputs, len(answer.prompt_token_ids)
    per_row = max(1, min(len(answers), (width + 3) // (MIN_COLUMN + 3)))
    column = (width + 3) // per_row - 3
    lines: list[str] = []
    for start in range(0, len(answers), per_row):
        columns = [render(one, prompt_len, column) for one in answers[start : start + per_row]]
        for i in range(max(map(len, columns))):
            cells = (lines_of[i] if i < len(lines_of) else "" for lines_of in columns)
            lines.append(" | ".join(cell.ljust(column) for cell in cells).rstrip())
        lines.append("")
    return lines[:-1]


def render(answer: CompletionOutput, prompt_len: int, column: int) -> list[str]:
    """Lays out one answer as a column.

    Args:
        answer: The answer.
        prompt_len: Tokens of the prompt.
        column: The width of the column in characters.

    Returns:
        The lines: the model, how much was cached and generated, and the text.
    """
    counts = (
        f"{answer.cached_tokens} of {prompt_len} from the cache, {len(answer.token_ids)} new ({answer.finish_reason})"
    )
    lines = [answer.model, *textwrap.wrap(counts, column), "-" * column]
    for line in answer.text.strip("\n").expandtabs(4).split("\n"):
        lines += textwrap.wrap(line, column, replace_whitespace=False, drop_whitespace=True) or [""]
    return lines


def run() -> None:
    """Reads the flags and runs the program; also the console script icarus-generate."""
    cli.run(main, default_config="multi.py")


if __name__ == "__main__":
    run()
