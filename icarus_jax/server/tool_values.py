"""The arguments of a tool one by one, as forms of calls write them that are no JSON as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from icarus_jax.server.tool_formats import read_literal, to_json

Schema = Mapping[str, Any]

_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
_WORDS = {"title", "description", "default", "examples", "deprecated", "$comment"}  # of a schema: they bind nothing
_ROOT = _WORDS | {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}
_REF = re.compile(r'"\$ref": "(?!#/(?:\$defs|definitions)/)')


def arguments_of(schema: Schema) -> dict[str, Schema] | None:
    """Returns the schema of each argument, in their order; None: the arguments cannot be told apart.

    Args:
        schema: the schema of all arguments. It must say no more than which there are and what each is.
    """
    properties = schema.get("properties", {})
    if schema.keys() - _ROOT or schema.get("additionalProperties") not in (None, False):
        return None
    if not isinstance(properties, dict) or _REF.search(json.dumps(properties)):
        return None
    if not all(isinstance(part, dict) and re.fullmatch(r"[^<>\s]+", name) for name, part in properties.items()):
        return None
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
        return None
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return {name: {**part, **shared} for name, part in properties.items()}


def is_text(schema: Schema) -> bool:
    """Whether an argument is written as it is, without quotes: a string that only maxLength or an enum binds."""
    values = texts_of(schema)
    if values is not None:
        return True
    most = schema.get("maxLength", 0)
    if schema.get("type") != "string" or type(most) is not int or most < 0:
        return False
    return schema.keys() <= _WORDS | {"type", "maxLength", "$defs", "definitions"}


def texts_of(schema: Schema) -> list[str] | None:
    """Returns the texts of which an argument is one; None: it is no such argument."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        return None
    return values if schema.keys() <= _WORDS | {"type", "enum", "const", "$defs", "definitions"} else None


def read_value(text: str, schema: Schema) -> str:
    """Reads an argument.

    Args:
        text: the argument as it is written: JSON, a literal of Python, or a string without quotes.
        schema: the argument's schema.

    Returns:
        The argument as JSON.
    """
    types = _types(schema)
    if not is_text(schema):
        for read in (json.loads, read_literal):
            try:
                value = read(text)
                written = to_json(value)
            except (ValueError, RecursionError):
                continue
            kind = _TYPES.get(type(value), "null")
            if not types or kind in types or (kind == "integer" and "number" in types):
                return written
    return json.dumps(text, ensure_ascii=False)


def _types(schema: Schema) -> set[str]:
    """Returns the types that a value may have; none: any type."""
    named = schema.get("type")
    types = {kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str)}
    for parts in (schema.get("anyOf"), schema.get("oneOf")):
        for part in parts if isinstance(parts, list) else []:
            types |= _types(part) if isinstance(part, dict) else set()
    return types
