"""The OpenAPI schema of the HTTP API.

Handlers read their bodies themselves, so that errors have OpenAI's form; FastAPI knows nothing of the bodies, and they
are added here from the same pydantic models that check them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from icarus_jax.server.body import Body

REFERENCE = "#/components/schemas/{model}"
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS = {
    "400": "A field is wrong; `param` names it.",
    "401": "The API key is missing or not known.",
    "404": "There is no such model or path.",
    "408": "The request's own deadline has passed.",
    "413": "The body is too large.",
    "429": "Too many requests wait; `Retry-After` says when to try again.",
    "500": "The server failed on this request.",
    "503": "The server is stopping, or its engine has failed.",
}


def describe_bodies(app: FastAPI, bodies: Mapping[str, type[Body]]) -> None:
    """Completes the app's schema with request bodies and errors.

    Args:
        app: the app, with all its routes.
        bodies: path -> the model that checks the body of its POST.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(get_openapi(title=app.title, version=app.version, routes=app.routes), bodies)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(schema: dict[str, Any], bodies: Mapping[str, type[Body]]) -> dict[str, Any]:
    models = sorted(set(bodies.values()), key=lambda model: model.__name__)
    names, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REFERENCE)
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions.get("$defs", {}))
    schemas["Error"] = ERROR_SCHEMA
    error = {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            for status, words in ERRORS.items():
                operation["responses"][status] = {"description": words, "content": error}
            operation["responses"].pop("422", None)
            if method == "post" and path in bodies:
                body = {"application/json": {"schema": names[bodies[path], "validation"]}}
                operation["requestBody"] = {"required": True, "content": body}
    return schema
