"""Training data: the rows of a JSONL file as token ids, split into training and validation.

A row has one of three forms: {"messages": [..]} with the completion as its last message and maybe "tools", as OpenAI
has it; {"prompt": .., "completion": ..}; or the format of one of the tasks in tasks.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from icarus_jax.chat_template import render
from icarus_jax.tasks import Task

HELD_OUT = 20  # every 20th example (5%) is for validation; it does not depend on the seed


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A prompt and its completion.

    Attributes:
        tokens: i32[n], the prompt's tokens and then the completion's.
        num_prompt: The number of prompt tokens.
        slot: The head that learns from it, counted from 1.
        start: How many tokens the examples before it have in packed rows; see `numbered`.
    """

    tokens: np.ndarray
    num_prompt: int
    slot: int
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes examples of the rows of a JSONL file.

    Attributes:
        tokenizer: The trunk's tokenizer. Its chat template renders messages.
        eos_ids: The ids of all tokens that end a sequence.
        max_length: The longest example that is allowed, in tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    max_length: int

    def encode(self, row: dict[str, Any], task: Task | None, slot: int) -> Example:
        """Encodes a row.

        Args:
            row: The row: messages, or a prompt and a completion, or a row of the task.
            task: How a row of neither of the first two forms becomes a prompt and its answer. None: it is an error.
            slot: The head that learns from it, counted from 1.

        Returns:
            The example. Its completion ends with an end-of-sequence token.

        Raises:
            TooLong: The example has more than `max_length` tokens.
            ValueError: The row has none of the forms, or its prompt or completion is empty.
        """
        if "messages" in row:
            prompt, completion = self._chat(row["messages"], row.get("tools"))
        elif "prompt" in row and "completion" in row:
            prompt, completion = self._plain(row["prompt"], row["completion"])
        elif task is not None:
            try:
                messages, tools = [*task.prompt(row), task.answer(row)], task.tools(row)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"is not of the task's format: {type(error).__name__} {error}") from None
            prompt, completion = self._chat(messages, tools)
        else:
            raise ValueError('needs {"messages": [..]} or {"prompt": .., "completion": ..}')
        total = len(prompt) + len(completion)
        if total > self.max_length:
            raise TooLong(f"has {total} tokens, prompt and completion, but at most {self.max_length} are allowed")
        return Example(np.array(prompt + completion, np.int32), len(prompt), slot)

    def _chat(self, messages: Any, tools: Any = None) -> tuple[list[int], list[int]]:
        """Returns the token ids of the prompt and of the completion, which is the last message.

        The completion includes what the template writes after the message, up to the end of the turn.
        """
        _check_messages(messages)
        try:
            whole = render(self.tokenizer, messages, tools)
            prompt = render(self.tokenizer, messages[:-1], tools, add_generation_prompt=True)
        except Exception as error:  # a template may fail in any way on what it was not written for
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"the chat template cannot render these messages: {reason}") from None
        if not whole.startswith(prompt):
            raise ValueError("the chat template does not write the conversation as its prompt and then the answer")
        return self._ids(prompt, False), self._ended(self._ids(whole[len(prompt) :], False))

    def _plain(self, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError('"prompt" and "completion" are not both strings')
        if not completion.strip():
            raise ValueError("the completion is empty")
        prompt_ids = self._ids(prompt, True)
        if not prompt_ids:
            raise ValueError("the prompt is empty")
        return prompt_ids, self._ended(self._ids(completion, False))

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        text.encode()  # raises ValueError for half a surrogate pair: JSON allows it, tokenizers do not
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def _ended(self, ids: list[int]) -> list[int]:
        """Cuts the ids after the first end-of-sequence token, or appends one: a head must learn where to stop."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        return ids[: end + 1] if end is not None else [*ids, int(self.tokenizer.eos_token_id)]


def _check_messages(messages: Any) -> None:
    """Raises ValueError unless the messages are a prompt and the assistant's answer to it."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError('"messages" is not a list of {"role": .., "content": ..}')
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError('the last of "messages" must be the assistant\'s, after at least one other')
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
            raise ValueError('every one of "messages" must have a "content" that is a string, or "tool_calls"')
    if not messages[-1].get("tool_calls") and not messages[-1]["content"].strip():
        raise ValueError("the completion (the last message's content) is empty")


class TooLong(ValueError):
    """An example has more tokens than `Encoder.max_length`."""


def read_examples(
    path: Path, encoder: Encoder, task: Task | None, slot: int = 1, skip_long: bool = False
) -> list[Example | None]:
    """Reads a JSONL file of training data.

    Args:
        path: The file. Empty lines are ignored.
        encoder: Makes the examples.
        task: The task whose format the rows may have; None for no task.
        slot: The head that learns from the file, counted from 1.
        skip_long: Whether examples that are too long are left out. Otherwise they are an error.

    Returns:
        An example for each row; None for one that is left out as too long.

    Raises:
        ValueError: The file does not exist, has no examples, or has a wrong line. The message names the line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --config.data.path=FILE names the training data")
    examples: list[Example | None] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("is not a JSON object")
                examples.append(encoder.encode(row, task, slot))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: broken JSON: {error.msg} (column {error.colno})") from None
            except TooLong as error:
                if not skip_long:
                    raise ValueError(
                        f"{path}:{number}: {error}; raise config.data.length (no further than the trunk's context), or "
                        "leave out what is too long with config.data.skip_long=True"
                    ) from None
                examples.append(None)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not any(examples):
        raise ValueError(f"{path} is empty: it has no examples" + (f" ({len(examples)} too long)" if examples else ""))
    return examples


def split(examples: Sequence[Example | None], count: int) -> tuple[list[Example], list[Example]]:
    """Splits examples into training and validation.

    Every HELD_OUT-th row is held out from training, whether or not others are left out. If there are more of these than
    `count`, the validation examples are taken from them at even distances, because the rows of a file may be sorted by
    class.

    Args:
        examples: An example for each row of a file, in its order; None for one that is left out.
        count: The largest number of validation examples.

    Returns:
        The training examples, and the validation examples.
    """
    held = [e for e in examples[HELD_OUT - 1 :: HELD_OUT] if e]
    count = min(count, len(held))
    validation = [held[i * len(held) // count] for i in range(count)]
    return [e for i, e in enumerate(examples, 1) if e and i % HELD_OUT], validation


def numbered(examples: Iterable[Example], prefix_len: int) -> list[Example]:
    """Sets `start` of examples.

    Args:
        examples: All examples.
        prefix_len: The length of the prefix that is left out of packed rows.

    Returns:
        The same examples, in their order.
    """
    placed, start = [], 0
    for example in examples:
        placed.append(dataclasses.replace(example, start=start))
        start += len(example.tokens) - 1 - prefix_len
    return placed


def common_prefix(examples: Iterable[Example]) -> np.ndarray:
    """Returns the tokens that all prompts begin with, for example those of the chat template.

    Args:
        examples: The examples, at least one.

    Returns:
        i32[P], shorter than every prompt.
    """
    prompts = [e.tokens[: e.num_prompt - 1] for e in examples]
    prefix = min(prompts, key=len)
    for prompt in prompts:
        differ = np.flatnonzero(prompt[: len(prefix)] != prefix)
        prefix = prefix[: differ[0]] if len(differ) else prefix
    return prefix
