"""Random schemas: what is valid is accepted, and what lacks something is not."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jsonschema

from icarus_jax.grammar.spec import GrammarSpec
from tests.grammar.following import accepts, make_compiler

COMPILER = make_compiler()
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NAMES = st.text("abcdefg_é", min_size=1, max_size=6)
INT = st.integers(-(10**6), 10**6)


@st.composite
def scalars(draw) -> tuple[dict, st.SearchStrategy]:
    """A schema without parts, and its instances."""
    low, high = sorted((draw(INT), draw(INT)))
    longest = draw(st.integers(0, 12))
    chosen = draw(st.lists(st.one_of(TEXT, INT, st.booleans()), min_size=1, max_size=4))
    return draw(
        st.sampled_from(
            [
                ({"type": "string", "maxLength": longest}, st.text(st.characters(codec="utf-8"), max_size=longest)),
                ({"type": "string", "pattern": "^[a-z]{2,4}[0-9]*$"}, st.from_regex(r"\A[a-z]{2,4}[0-9]{0,3}\Z")),
                ({"type": "integer", "minimum": low, "maximum": high}, st.integers(low, high)),
                ({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False)),
                ({"type": "boolean"}, st.booleans()),
                ({"type": "null"}, st.none()),
                ({"type": ["integer", "null"]}, st.none() | INT),
                ({"enum": chosen}, st.sampled_from(chosen)),
                ({"const": chosen[0]}, st.just(chosen[0])),
            ]
        )
    )


@st.composite
def arrays(draw, parts) -> tuple[dict, st.SearchStrategy]:
    schema, instances = draw(parts)
    least = draw(st.integers(0, 2))
    most = least + draw(st.integers(0, 2))
    asked = {"type": "array", "items": schema, "minItems": least, "maxItems": most}
    return asked, st.lists(instances, min_size=least, max_size=most)


@st.composite
def objects(draw, parts) -> tuple[dict, st.SearchStrategy]:
    named = draw(st.dictionaries(NAMES, parts, max_size=4))
    required = [name for name in named if draw(st.booleans())]
    schema = {
        "type": "object",
        "properties": {name: part for name, (part, _) in named.items()},
        "required": required,
        "additionalProperties": False,
    }
    needed = {name: named[name][1] for name in required}
    other = {name: instances for name, (_, instances) in named.items() if name not in required}
    # A grammar fixes the order: that of the schema.
    ordered = st.fixed_dictionaries(needed, optional=other).map(lambda made: {n: made[n] for n in named if n in made})
    return schema, ordered


@st.composite
def either(draw, parts) -> tuple[dict, st.SearchStrategy]:
    options = draw(st.lists(parts, min_size=1, max_size=3))
    return {"anyOf": [schema for schema, _ in options]}, st.one_of([instances for _, instances in options])


SCHEMAS = st.recursive(scalars(), lambda parts: arrays(parts) | objects(parts) | either(parts), max_leaves=8)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_instances_of_random_schemas_are_accepted(data):
    schema, instances = data.draw(SCHEMAS)
    grammar = COMPILER.compile(GrammarSpec.json_schema(schema, "response_format"))
    instance: Any = data.draw(instances)
    jsonschema.validate(instance, schema)
    text = json.dumps(instance, ensure_ascii=False)
    assert accepts(grammar, text)
    assert not accepts(grammar, text + "x") and not accepts(grammar, "[" + text)
