"""A chat in the terminal with the models of a running server: one prompt, every head's answer beside the others.

    python launch/chat.py                                    all models of the server that `make serve` starts
    python launch/chat.py --url=http://HOST:8000 --models=intent,sql

An API key is taken from the environment variable OPENAI_API_KEY. Below the answers stands what the prompt cost: how
many of its tokens were in the cache, whichever model had written or read them. A handoff is marked where it happens.
/help lists the commands.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from rich.console import Console

from icarus_jax.errors import UsageError
from icarus_jax.terminal.chat import HELP, Chat
from icarus_jax.terminal.client import Server, ServerError

_URL = flags.DEFINE_string("url", "http://127.0.0.1:8000", "the server's address")
_MODELS = flags.DEFINE_list("models", [], "a,b: the models that answer (all)")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "tokens of an answer at most", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token", lower_bound=0.0)
_KL = flags.DEFINE_bool("kl", False, "show how far each answer is from the trunk; not for heads with K/V of their own")


def main(argv: list[str]) -> None:
    """Reads lines until there are no more."""
    if len(argv) > 1:
        raise app.UsageError(f"no argument {argv[1]!r}: all settings are flags")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log each request between the answers
    console = Console(highlight=False)
    options = {"max_tokens": _MAX_TOKENS.value, "temperature": _TEMPERATURE.value, "reference_logprobs": _KL.value}
    try:
        chat = Chat(Server(_URL.value, os.environ.get("OPENAI_API_KEY", "")), console, _MODELS.value, options)
    except (ServerError, UsageError) as error:
        sys.exit(f"{error}")
    if console.is_terminal:
        import readline  # noqa: F401  # edits the line that `input` reads, and keeps a history

        console.print(HELP)
    prompt = "> " if console.is_terminal else ""
    while True:
        try:
            line = input(prompt)
        except KeyboardInterrupt:
            console.print()
            continue
        except EOFError:
            return
        if not chat.say(line):
            return


def run() -> None:
    """Reads the flags and runs the program; also the console script icarus-chat."""
    if {"--help", "-h"} & set(
        sys.argv[1:]
    ):  # absl's own help lists the flags of the module that is run, and exits with 1
        module = sys.argv[0] if __name__ == "__main__" else __name__
        print(f"{(__doc__ or '').strip()}\n\nflags:{flags.FLAGS.module_help(module)}")
        return
    app.run(main)


if __name__ == "__main__":
    run()
