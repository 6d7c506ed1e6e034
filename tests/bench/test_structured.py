"""The benchmark of structured output: where its schemas come from, and that it times what it says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from icarus_jax.bench import schemas, structured
from icarus_jax.grammar.compiler import Matcher
from icarus_jax.grammar.spec import GrammarSpec
from tests import tiny
from tests.engine.harness import SMALL, make_engine
from tests.grammar.following import TOKENIZER, accepts, make_compiler

NAMED = {"properties": {"a": {"type": "integer"}}}


def test_schemas_are_found_in_files_of_all_kinds(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": NAMED}}
    row = json.dumps({"query": "one\u2028two", "tools": [tool, tool]}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text("\n".join([row] * 3))
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    (folder / "one.json").write_text(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"}))
    (folder / "other.json").write_text('{"$schema": "https://example.com", "x": 1}')
    (folder / "broken.json").write_text("{")
    shared = {"schemas": {"A": {"type": "array", "items": {"$ref": "#/components/schemas/B"}}, "B": {"const": 5}}}
    (tmp_path / "api.json").write_text(json.dumps({"openapi": "3.1.0", "components": shared}))
    paths = [str(tmp_path / name) for name in ("rows.jsonl", "folder", "api.json")]
    found = schemas.read_schemas(paths, 100)
    assert [schema.get("$ref", schema) for schema in found] == [
        NAMED,
        {"$schema": "https://json-schema.org/draft/2020-12/schema"},
        "#/components/schemas/A",
        "#/components/schemas/B",
    ]
    grammar = make_compiler().compile(GrammarSpec.json_schema(found[2], "schema"))
    assert accepts(grammar, "[5]") and not accepts(grammar, "[6]")
    assert len(schemas.read_schemas(paths, 2)) == 2
    with pytest.raises(ValueError):
        schemas.read_schemas([str(folder / "broken.json")], 2)
    assert "messages" in json.dumps(schemas.read_schemas([], 100))


def test_what_is_compiled_and_what_is_refused():
    odd = {"type": "array", "uniqueItems": True}
    grammars, times, refused = structured.compile_all(make_compiler(), [NAMED, odd, NAMED])
    assert len(grammars) == 2 and len(times) == 3 and (times > 0).all()
    assert len(refused) == 1 and "uniqueItems" in refused[0]
    assert len(structured.mask_times(grammars, len(TOKENIZER), 7)) <= 14


def test_spread():
    assert structured.spread(np.arange(101) / 1e3) == {"p50_ms": 50.0, "p99_ms": 99.0, "max_ms": 100.0}
    assert structured.spread(np.array([])) == {}


def test_bound_answers_follow_the_schema_and_free_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(structured, "ROUNDS", 1)
    accepted: list[int] = []
    accept = Matcher.accept
    monkeypatch.setattr(Matcher, "accept", lambda self, token: accepted.append(token) or accept(self, token))
    folder = tiny.tiny_model("llama", tmp_path / "model")
    engine = make_engine(folder, {}, dataclasses.replace(SMALL, max_num_seqs=2))
    grammar = make_compiler().compile(GrammarSpec.json_schema(structured.SCHEMA, "schema"))
    rows = structured.decode_rates(engine, grammar, [1, 2], 8, 3)
    assert [row["sequences"] for row in rows] == [1, 2]
    assert all(row["free"] > 0 and row["bound"] > 0 and row["ratio"] > 0 for row in rows)
    assert len(accepted) >= 2 * (1 + 2) * 3 and TOKENIZER.decode(accepted[:1]) == "["
