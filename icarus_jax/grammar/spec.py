"""What a request asks its answer to follow."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from icarus_jax.errors import RequestError

MAX_CHARACTERS = 200_000  # of a grammar's text


@dataclasses.dataclass(frozen=True)
class GrammarSpec:
    """A grammar as text, so that equal ones are compiled once.

    Attributes:
        kind: 'json_schema', 'regex' or 'lark'.
        text: The schema as JSON, the regular expression, or the grammar in llguidance's dialect of Lark.
        field: The request's field that asked for it, for error messages.
    """

    kind: str
    text: str
    field: str = dataclasses.field(default="", compare=False)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str, field: str) -> GrammarSpec:
        """Makes the grammar of JSON that a schema allows; {} allows any JSON."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema), field)

    @classmethod
    def json_object(cls, field: str) -> GrammarSpec:
        """Makes the grammar of any JSON object."""
        return cls.json_schema({"type": "object"}, field)

    @classmethod
    def choice(cls, choices: Sequence[str], field: str) -> GrammarSpec:
        """Makes the grammar of one of some texts.

        Raises:
            RequestError: There are none.
        """
        if not any(choices):
            raise RequestError(f"{field} has no choices", field)
        return cls("regex", "|".join(re.escape(choice) for choice in choices), field)


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """What an answer has to follow; the names are vLLM's. Exactly one is given.

    Attributes:
        json: A JSON schema, as an object or as text. {} allows any JSON.
        regex: A regular expression that the whole answer matches, without look-around.
        choice: The texts of which the answer is one.
        grammar: A grammar in llguidance's dialect of Lark, or in llama.cpp's GBNF.
        json_object: True: any JSON object.

    Raises:
        RequestError: Not exactly one is given.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            names = " and ".join(given) or "nothing"
            wanted = "one of json, regex, choice, grammar and json_object"
            raise RequestError(f"structured_outputs has {names}; it must have {wanted}", "structured_outputs")

    def spec(self, field: str = "structured_outputs") -> GrammarSpec:
        """Returns the grammar.

        Args:
            field: The request's field that asks for it, for error messages.

        Raises:
            RequestError: There are no choices.
        """
        if self.json is not None:
            return GrammarSpec.json_schema(self.json, field)
        if self.regex is not None:
            return GrammarSpec("regex", self.regex, field)
        if self.choice is not None:
            return GrammarSpec.choice(self.choice, field)
        return GrammarSpec("lark", self.grammar, field) if self.grammar is not None else GrammarSpec.json_object(field)
