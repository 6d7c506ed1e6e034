"""From a request's prompt or conversation to token ids that fit the context."""

from __future__ import annotations

import dataclasses

from icarus_jax.server.body import ApiError
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.protocol import ChatPrompt


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, its text if it came as text, and the request's field that it came in."""

    ids: tuple[int, ...]
    text: str | None
    field: str


class PromptReader:
    """Makes prompts and checks them. vocab_size: the trunk's V; max_model_len: tokens of a prompt plus its output."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, max_model_len: int):
        self.vocabulary = vocabulary
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len

    def read(self, prompt: str | list[int], field: str, add_special_tokens: bool) -> Prompt:
        """Raises ApiError: empty, too long, or an id out of range."""
        if isinstance(prompt, str):
            self._check_characters(prompt, field)
            ids = self.vocabulary.encode(prompt, add_special_tokens)
            made = Prompt(tuple(ids), prompt, field)
        else:
            self.check_ids(prompt, field)
            made = Prompt(tuple(prompt), None, field)
        if not made.ids:
            raise ApiError(400, f"{field} is empty; it must have at least one token", field)
        return made

    def render(self, chat: ChatPrompt) -> str:
        """A conversation as the chat template writes it. Raises ApiError with what the template has against it."""
        generate = chat.add_generation_prompt
        try:
            return self.vocabulary.tokenizer.apply_chat_template(
                **{
                    **chat.chat_template_kwargs,
                    "conversation": [message.render() for message in chat.messages],
                    "tools": chat.tools,
                    "add_generation_prompt": not chat.continue_final_message if generate is None else generate,
                    "continue_final_message": chat.continue_final_message,
                    "tokenize": False,
                }
            )
        except Exception as error:  # a template may fail in any way on what it was not written for
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ApiError(400, f"the chat template cannot render these messages: {reason}", "messages") from error

    def read_chat(self, chat: ChatPrompt) -> Prompt:
        return self.read(self.render(chat), "messages", chat.add_special_tokens)

    def check_ids(self, ids: list[int], field: str) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ApiError(400, f"{field} has the token id {token_id}; ids lie in 0..{self.vocab_size - 1}", field)

    def room(self, prompt: Prompt, asked: int | None, asked_field: str = "max_tokens") -> int:
        """How many tokens may follow the prompt. Raises ApiError if it leaves no room, or less than was asked for."""
        num = len(prompt.ids)
        room = self.max_model_len - num
        if room < 0 or (room == 0 and asked != 0):
            self._too_long(f"{prompt.field} has {num} tokens", prompt.field)
        if asked is not None and asked > room:
            self._too_long(f"{prompt.field} has {num} tokens and {asked_field} is {asked}", asked_field)
        return room

    def _check_characters(self, text: str, field: str) -> None:
        """Refuses what cannot fit before time is spent on tokenizing it."""
        if len(text) > self.max_model_len * self.vocabulary.longest:
            self._too_long(f"{field} has {len(text)} characters", field)

    def _too_long(self, what: str, field: str) -> None:
        message = f"{what}; the context holds {self.max_model_len} tokens, prompt and output together"
        raise ApiError(400, message, field, "context_length_exceeded")
