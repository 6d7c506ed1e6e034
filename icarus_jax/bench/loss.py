"""`bench.py loss`: how well a trunk, as it is served, predicts text.

What another precision of the weights or pages costs, or an adapter merged into the trunk, is the difference of the
losses of two runs on the same texts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax.errors import UsageError
from icarus_jax.llm import LLM
from icarus_jax.scheduling.request import SamplingParams

CHUNK = 1024  # the most tokens of a text that are predicted from one beginning, if the engine takes as many


def texts_of(paths: Sequence[str]) -> list[str]:
    """Reads texts.

    Args:
        paths: Files. Of a .jsonl file each line is a text: all strings in it, a line each. Other files are one text.

    Raises:
        UsageError: A file cannot be read.
    """
    texts = []
    for path in paths:
        try:
            content = Path(path).expanduser().read_text()
            # Not splitlines: a string in JSON may have other ends of lines than the one between rows.
            lines = [line for line in content.split("\n") if line.strip()]
            rows = [json.loads(line) for line in lines] if path.endswith(".jsonl") else [content]
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: {error}") from error
        texts += ["\n".join(_strings(row)) for row in rows]
    return texts


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def run(config: ConfigDict, paths: Sequence[str], tokens: int) -> dict[str, Any]:
    """Runs the command.

    Args:
        config: A config for serving. Its heads are left out.
        paths: The files with the texts; see `texts_of`. Every file has its share of the tokens if it is long enough.
        tokens: How many tokens to predict, at most.

    Returns:
        `tokens`, how many were predicted; `loss`, their mean loss in nats, and its standard error over the chunks;
        `perplexity`; and `files`, the loss of each file.

    Raises:
        UsageError: There are no texts, or fewer tokens than files.
    """
    if not paths:
        raise UsageError("give --texts=FILE,..")
    if tokens < len(paths):
        raise UsageError(f"--tokens={tokens}: it is at least 1 for each file, {len(paths)} in all")
    with config.unlocked():
        config.heads = {}
    chunk = min(CHUNK, config.engine.max_model_len - 1)
    with LLM.from_config(config) as llm:
        found = {
            path: _losses(llm, texts_of([path]), tokens // len(paths), chunk) for path in tqdm(paths, disable=None)
        }
    chunks = [chunk for losses in found.values() for chunk in losses]
    if not chunks:
        raise UsageError(f"no text of two tokens or more: {', '.join(paths)}")
    loss = float(np.concatenate(chunks).mean())
    sums, sizes = (np.array([measure(chunk) for chunk in chunks]) for measure in (np.sum, len))
    error = np.sqrt(np.sum((sums - loss * sizes) ** 2)) / sizes.sum()
    return {
        "command": " ".join(sys.argv),
        "tokens": int(sizes.sum()),
        "loss": round(loss, 5),
        "standard_error": round(float(error), 5),
        "perplexity": round(float(np.exp(loss)), 4),
        "files": {path: round(float(np.concatenate(found[path]).mean()), 5) for path in paths if found[path]},
    }


def _losses(llm: LLM, texts: Sequence[str], tokens: int, most: int) -> list[np.ndarray]:
    """Returns the losses of each chunk's tokens, all but its first one, until there are enough; most: its tokens."""
    chunks: list[list[int]] = []
    room = tokens
    for ids in map(llm.tokenizer.encode, texts):
        for i in range(0, len(ids), most):
            chunks.append(ids[i : min(i + most, i + room + 1)])
            room -= len(chunks[-1]) - 1
            if room <= 0:
                break
        if room <= 0:
            break
    chunks = [chunk for chunk in chunks if len(chunk) > 1]
    outputs = llm.generate(chunks, sampling_params=SamplingParams(max_tokens=1, prompt_logprobs=0))
    scored = [output.outputs[0].prompt_logprobs or [] for output in outputs]
    return [np.array([-entry.logprob for entry in entries if entry is not None]) for entries in scored]
