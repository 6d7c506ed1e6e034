"""What a request asks its answer to follow."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

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
    def json_schema(cls, schema: dict[str, Any] | bool | str, field: str) -> GrammarSpec:
        """Makes the grammar of JSON that a schema allows; {} allows any JSON."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema), field)

    @classmethod
    def json_object(cls, field: str) -> GrammarSpec:
        """Makes the grammar of any JSON object."""
        return cls.json_schema({"type": "object"}, field)

    @classmethod
    def choice(cls, choices: Sequence[str], field: str) -> GrammarSpec:
        """Makes the grammar of one of some texts."""
        return cls("regex", "|".join(re.escape(choice) for choice in choices), field)
