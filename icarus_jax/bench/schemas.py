"""JSON schemas of real life, from files: of tools, of services (OpenAPI), and schemas themselves."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def read_schemas(paths: Iterable[str], most: int) -> list[dict[str, Any]]:
    """Reads schemas.

    Args:
        paths: files and folders. Of a folder, every *.json file is read. A file may be a schema, a service's
            description with components.schemas, or rows of JSON with `tools` as OpenAI has them.
        most: how many to return; if there are more, they are drawn, always the same.

    Returns:
        The schemas, each once. Without paths: those of this server's own requests.
    """
    found = list(_own()) if not paths else [schema for path in paths for schema in _of_path(Path(path).expanduser())]
    each = list({json.dumps(schema, sort_keys=True): schema for schema in found}.values())
    return each if len(each) <= most else random.Random(0).sample(each, most)


def _own() -> Iterator[dict[str, Any]]:
    from icarus_jax.server.api import Api

    for body in Api.bodies.values():
        yield body.model_json_schema()


def _of_path(path: Path) -> Iterator[dict[str, Any]]:
    files: Sequence[Path] = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    for file in files:
        try:
            text = file.read_bytes()
            values = map(json.loads, text.splitlines()) if file.suffix == ".jsonl" else [json.loads(text)]
            for value in values:
                yield from _of_value(value)
        except ValueError:
            if not path.is_dir():
                raise


def _of_value(value: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(value, dict):
        return
    for tool in value.get("tools") or []:
        yield tool["function"].get("parameters", {"type": "object"})
    components = value.get("components")
    if isinstance(components, dict) and isinstance(components.get("schemas"), dict):
        for name in components["schemas"]:
            yield {"$ref": f"#/components/schemas/{name}", "components": components}
    elif "json-schema.org" in str(value.get("$schema")) or isinstance(value.get("properties"), dict):
        yield value
