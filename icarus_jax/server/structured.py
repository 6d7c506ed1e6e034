"""The fields of a request that say what its answer has to follow: JSON, a pattern, one of some texts, a grammar.

OpenAI's `response_format`, vLLM's `structured_outputs`, and vLLM's older `guided_json`, `guided_regex`, `guided_choice`
and `guided_grammar`. One request may have one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from icarus_jax.engine.engine import Engine
from icarus_jax.errors import RequestError
from icarus_jax.grammar.compiler import Compiler
from icarus_jax.grammar.spec import GrammarSpec, StructuredOutputsParams
from icarus_jax.server.body import Body
from icarus_jax.server.other_fields import OFF


class JsonSchema(Body):
    """A named schema. Answers follow it whether `strict` is true or not."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise RequestError("response_format has json_schema with the type json_schema only", "response_format")
        return self

    def spec(self) -> GrammarSpec | None:
        """Returns what the answer has to follow; None for text."""
        if self.json_schema is not None:
            return GrammarSpec.json_schema(self.json_schema.schema_, "response_format")
        return GrammarSpec.json_object("response_format") if self.type == "json_object" else None


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: exactly one of its first five fields."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {"structural_tag": OFF}

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_additional_properties: Literal[False] = False

    def spec(self) -> GrammarSpec:
        """Returns what the answer has to follow."""
        return StructuredOutputsParams(self.json_, self.regex, self.choice, self.grammar, self.json_object).spec()


class Structured(Body):
    """The fields of a request about the form of its answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Structured:
        self.grammar_spec()
        return self

    def grammar_spec(self) -> GrammarSpec | None:
        """Returns what the answer has to follow; None for free text.

        Raises:
            RequestError: Two fields say it, or one of them is wrong.
        """
        asked = [part.spec() for part in (self.response_format, self.structured_outputs) if part is not None]
        for name in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{name}")) is not None:
                asked.append(StructuredOutputsParams(**{name: value}).spec(f"guided_{name}"))
        specs = [spec for spec in asked if spec is not None]
        if len(specs) > 1:
            names = " and ".join(spec.field for spec in specs)
            raise RequestError(f"{names} exclude each other: one of them says what to follow", specs[1].field)
        return specs[0] if specs else None


def make_compiler(engine: Engine, tokenizer: Any, eos_ids: Iterable[int]) -> Compiler:
    """Makes what compiles the grammars of an engine's answers.

    Args:
        engine: the engine.
        tokenizer: the trunk's Hugging Face fast tokenizer.
        eos_ids: the ids of the tokens that end a text.
    """
    return Compiler(tokenizer.backend_tokenizer.to_str(), engine.model_config.vocab_size, eos_ids)
