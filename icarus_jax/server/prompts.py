"""Makes token ids of a request's prompt or conversation, and checks that they fit the context."""

from __future__ import annotations

import dataclasses
from typing import Any

from icarus_jax.chat_template import render
from icarus_jax.server.body import ApiError
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.protocol import ChatPrompt


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt that has been read and checked.

    Attributes:
        ids: its token ids.
        text: its text, or None if it came as token ids.
        field: the request's field that it came in.
    """

    ids: tuple[int, ...]
    text: str | None
    field: str


class PromptReader:
    """Reads prompts and conversations, and checks that the engine can serve them.

    Attributes:
        vocabulary: translates between text and token ids.
        vocab_size: the number of token ids that the trunk knows.
        max_model_len: how many tokens a prompt and its output may have together.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, max_model_len: int):
        """Takes the limits that prompts are checked against.

        Args:
            vocabulary: translates between text and token ids.
            vocab_size: the number of token ids that the trunk knows.
            max_model_len: how many tokens a prompt and its output may have together.
        """
        self.vocabulary = vocabulary
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len

    def read(self, prompt: str | list[int], field: str, add_special_tokens: bool) -> Prompt:
        """Reads a prompt.

        Args:
            prompt: a text or token ids.
            field: the request's field that it came in; errors name it.
            add_special_tokens: whether the tokenizer adds its own tokens, such as BOS, to a text.

        Returns:
            The prompt. It may still leave no room for output; see `room`.

        Raises:
            ApiError: the prompt is empty, has more ids than the context holds, is a text far too long for it, or has an
                id out of range.
        """
        if isinstance(prompt, str):
            self._check_characters(prompt, field)
            ids = self.vocabulary.encode(prompt, add_special_tokens)
            made = Prompt(tuple(ids), prompt, field)
        else:
            self.check_count(len(prompt), field)
            self.check_ids(prompt, field)
            made = Prompt(tuple(prompt), None, field)
        if not made.ids:
            raise ApiError(400, f"{field} is empty; it must have at least one token", field)
        return made

    def render(self, chat: ChatPrompt) -> str:
        """Writes a conversation as text, with the tokenizer's chat template.

        Args:
            chat: the conversation and the template's options.

        Returns:
            The text.

        Raises:
            ApiError: the template cannot render the conversation; the message gives the template's reason.
        """
        generate = chat.add_generation_prompt
        tokenizer = self.vocabulary.tokenizer
        effort = {} if chat.reasoning_effort is None else {"reasoning_effort": chat.reasoning_effort}
        try:
            return render(
                tokenizer,
                [message.plain() for message in chat.messages],
                chat.tools,
                **{
                    **effort,
                    **chat.chat_template_kwargs,
                    "add_generation_prompt": not chat.continue_final_message if generate is None else generate,
                    "continue_final_message": chat.continue_final_message,
                },
            )
        except Exception as error:  # a template is a program, and may raise anything on input it does not expect
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ApiError(400, f"the chat template cannot render these messages: {reason}", "messages") from error

    def template(self, tools: list[dict[str, Any]] | None) -> str:
        """Returns the source of the chat template; with tools that of the one for them, if there are several."""
        source: str = self.vocabulary.tokenizer.get_chat_template(tools=tools)
        return source

    def read_chat(self, chat: ChatPrompt) -> Prompt:
        """Reads a conversation: renders it, then encodes the text.

        Args:
            chat: the conversation and the template's options.

        Returns:
            The prompt; its field is 'messages'.

        Raises:
            ApiError: as of `render` and `read`.
        """
        return self.read(self.render(chat), "messages", chat.add_special_tokens)

    def check_count(self, num: int, field: str) -> None:
        """Refuses more tokens than the context holds, before any time is spent on them.

        Args:
            num: how many there are.
            field: the request's field that they came in.

        Raises:
            ApiError: they are too many.
        """
        if num > self.max_model_len:
            self._too_long(f"{field} has {num} tokens", field)

    def check_ids(self, ids: list[int], field: str) -> None:
        """Checks token ids.

        Args:
            ids: the token ids.
            field: the request's field that they came in.

        Raises:
            ApiError: an id is not one of the trunk's.
        """
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ApiError(400, f"{field} has the token id {token_id}; ids lie in 0..{self.vocab_size - 1}", field)

    def room(self, prompt: Prompt, asked: int | None, asked_field: str = "max_tokens") -> int:
        """Returns how many tokens may follow a prompt.

        Args:
            prompt: the prompt.
            asked: how many tokens the request asks for at most; None: it does not say.
            asked_field: the request's field that says so.

        Returns:
            The tokens that the context has left after the prompt.

        Raises:
            ApiError: the prompt leaves no room, or less than the request asks for.
        """
        num = len(prompt.ids)
        room = self.max_model_len - num
        if room < 0 or (room == 0 and asked != 0):
            self._too_long(f"{prompt.field} has {num} tokens", prompt.field)
        if asked is not None and asked > room:
            self._too_long(f"{prompt.field} has {num} tokens and {asked_field} is {asked}", asked_field)
        return room

    def _check_characters(self, text: str, field: str) -> None:
        """Refuses a text that cannot fit the context, before any time is spent on encoding it."""
        if len(text) > self.max_model_len * self.vocabulary.longest:
            self._too_long(f"{field} has {len(text)} characters", field)

    def _too_long(self, what: str, field: str) -> None:
        message = f"{what}; the context holds {self.max_model_len} tokens, prompt and output together"
        raise ApiError(400, message, field, "context_length_exceeded")
