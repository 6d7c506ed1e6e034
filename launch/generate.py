"""Puts one prompt to several models and prints their answers side by side.

    python launch/generate.py --config=multi.py --prompt='The capital of France is' --max_tokens=8
    python launch/generate.py --config=multi.py:2 --prompt='Who are you?' --chat --models=h0,h1 --json

The prompt is taken as it is; --chat makes it a user's message in the model's chat template. The first model fills the
cache, the others start from it: each column says how many of the prompt's tokens came from the cache. With --json,
stdout is one line: {"prompt_ids", "models": [{"model", "text", "token_ids", "cached_tokens", "finish_reason"}, ...]}.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax import cli
from icarus_jax.sequence import SamplingParams, TokenOutput

if TYPE_CHECKING:
    from icarus_jax.engine import Engine
    from icarus_jax.text import Vocabulary

_PROMPT = flags.DEFINE_string("prompt", None, "the prompt's text")
_PROMPT_IDS = flags.DEFINE_list("prompt_ids", None, "1,2,3: the prompt's token ids, instead of --prompt")
_CHAT = flags.DEFINE_bool("chat", False, "put --prompt into the chat template")
_MODELS = flags.DEFINE_list("models", None, "a,b: the models to ask (all)")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "tokens to generate at most")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token")
_SEED = flags.DEFINE_integer("seed", None, "of the random draws")
_JSON = flags.DEFINE_bool("json", False, "print one line of JSON")
_HEADS = cli.define_heads()

MIN_COLUMN = 32  # characters; models that do not fit beside each other go below


@dataclasses.dataclass
class Answer:
    model: str
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: str = ""

    def add(self, output: TokenOutput) -> None:
        self.token_ids += output.token_ids
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        self.finish_reason = output.finish_reason or self.finish_reason


def main(config: ConfigDict) -> None:
    cli.add_heads(config, _HEADS.value or ())
    models = pick_models(cli.served_names(config))
    params = SamplingParams(max_tokens=_MAX_TOKENS.value, temperature=_TEMPERATURE.value, seed=_SEED.value)
    given_ids = parse_prompt_ids()

    app = cli.build(config)
    from icarus_jax import text

    vocabulary = text.Vocabulary(app.tokenizer)
    prompt_ids = encode_prompt(vocabulary, _PROMPT.value or "") if given_ids is None else given_ids
    app.start()
    try:
        answers = ask(app.engine, models, prompt_ids, params)
    finally:
        app.engine.shutdown(drain=False)
    for answer in answers:
        detokenizer = text.Detokenizer(vocabulary, params, prompt_ids=prompt_ids)
        answer.text = detokenizer.push(answer.token_ids) + detokenizer.finish()
    if _JSON.value:
        print(json.dumps({"prompt_ids": prompt_ids, "models": [dataclasses.asdict(answer) for answer in answers]}))
    else:
        width = shutil.get_terminal_size().columns
        print("\n".join(side_by_side(answers, len(prompt_ids), width)))


def pick_models(served: list[str]) -> list[str]:
    for name in _MODELS.value or ():
        if name not in served:
            raise cli.UsageError(f"--models: no model {name!r}; served are {', '.join(served)}")
    return list(dict.fromkeys(_MODELS.value or served))


def parse_prompt_ids() -> list[int] | None:
    """The ids of --prompt_ids, or None if there is a --prompt instead."""
    if (_PROMPT.value is None) == (_PROMPT_IDS.value is None):
        raise cli.UsageError("give the prompt as either --prompt=TEXT or --prompt_ids=1,2,3")
    if _PROMPT_IDS.value is None:
        return None
    if _CHAT.value:
        raise cli.UsageError("--chat needs --prompt=TEXT; token ids are taken as they are")
    try:
        return [int(word) for word in _PROMPT_IDS.value]
    except ValueError:
        raise cli.UsageError(f"--prompt_ids={','.join(_PROMPT_IDS.value)}: not numbers like 1,2,3") from None


def encode_prompt(vocabulary: Vocabulary, prompt: str) -> list[int]:
    if not _CHAT.value:
        return vocabulary.encode(prompt)
    if not vocabulary.tokenizer.chat_template:
        raise cli.UsageError("--chat: this trunk has no chat template; leave --chat out")
    message = [{"role": "user", "content": prompt}]
    rendered = vocabulary.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return vocabulary.encode(rendered, add_special_tokens=False)


def ask(engine: Engine, models: list[str], prompt_ids: list[int], params: SamplingParams) -> list[Answer]:
    """Asks the first model, and the others as soon as the prompt's K/V is in the cache."""
    from icarus_jax.requests import Request

    outputs: queue.SimpleQueue[tuple[Answer, TokenOutput]] = queue.SimpleQueue()
    answers = [Answer(model) for model in models]

    def submit(answer: Answer) -> None:
        request = Request((answer.model,), tuple(prompt_ids), params)
        engine.submit(request, lambda _, output: outputs.put((answer, output)))

    submit(answers[0])
    waiting = answers[1:]
    total = params.max_tokens * len(models)
    with tqdm(total=total, unit="token", file=sys.stderr, disable=None, leave=False) as bar:
        while not all(answer.finish_reason for answer in answers):
            answer, output = outputs.get()
            answer.add(output)
            bar.update(len(output.token_ids))
            while waiting:
                submit(waiting.pop(0))
    return answers


def side_by_side(answers: list[Answer], prompt_len: int, width: int) -> list[str]:
    """The answers as columns that fit into `width` characters; as many rows of columns as that takes."""
    per_row = max(1, min(len(answers), (width + 3) // (MIN_COLUMN + 3)))
    column = (width + 3) // per_row - 3
    lines: list[str] = []
    for start in range(0, len(answers), per_row):
        columns = [render(answer, prompt_len, column) for answer in answers[start : start + per_row]]
        for i in range(max(map(len, columns))):
            cells = (lines_of[i] if i < len(lines_of) else "" for lines_of in columns)
            lines.append(" | ".join(cell.ljust(column) for cell in cells).rstrip())
        lines.append("")
    return lines[:-1]


def render(answer: Answer, prompt_len: int, column: int) -> list[str]:
    counts = (
        f"{answer.cached_tokens} of {prompt_len} from the cache, {len(answer.token_ids)} new ({answer.finish_reason})"
    )
    lines = [answer.model, *textwrap.wrap(counts, column), "-" * column]
    for line in answer.text.strip("\n").expandtabs(4).split("\n"):
        lines += textwrap.wrap(line, column, replace_whitespace=False, drop_whitespace=True) or [""]
    return lines


if __name__ == "__main__":
    cli.run(main, default_config="multi.py")
