"""The OpenAPI description: FastAPI's own, with what transformers' server leaves out: bodies, errors, keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from openai.types import Completion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from ray_ep.rank.generate.requests import Limits
from ray_ep.serve.http.bodies import ChatBody, CompletionBody
from ray_ep.serve.http.guard import OPEN
from ray_ep.serve.http.served import Served

_PATHS: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "/v1/chat/completions": (ChatBody, ChatCompletion),
    "/v1/completions": (CompletionBody, Completion),
}
_REFUSED = {
    "400": "The request cannot be computed: the message says what is allowed.",
    "404": "Another model is asked for.",
    "413": "The body is too large.",
    "429": "Too many answers are under way: Retry-After says when to ask again.",
    "503": "Ranks do not answer, or the server is stopping.",
}
_ERROR: dict[str, Any] = {
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


def describe(app: FastAPI, served: Served, limits: Limits, locked: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of the application.

    Args:
        limits: what a request may have. locked: whether it asks for a key.
    """
    tree = get_openapi(title=app.title, version=app.version, routes=app.routes)
    parts = tree.setdefault("components", {})
    schemas: dict[str, Any] = {"Error": _ERROR}
    parts["schemas"] = schemas
    for path, (body, answer) in _PATHS.items():
        post = tree["paths"][path]["post"]
        named = _schema(body, schemas)
        schemas[body.__name__]["properties"]["model"] = {"type": "string", "enum": [served.name]}
        post["requestBody"] = {"required": True, "content": {"application/json": {"schema": named}}}
        told = {"application/json": {"schema": _schema(answer, schemas, "serialization")}, "text/event-stream": {}}
        post["responses"] = {"200": {"description": "The answer, or a stream of it.", "content": told}}
        for status, words in _REFUSED.items():
            post["responses"][status] = _problem(words)
    prompt = schemas["CompletionBody"]["properties"]["prompt"]
    for kind in prompt["anyOf"]:
        while "items" in kind:
            kind = kind["items"]
        if kind["type"] == "integer":
            kind |= {"minimum": 0, "maximum": limits.vocabulary - 1}
    for path in ("/health", "/ready"):
        tree["paths"][path]["get"]["responses"]["503"] = {
            "description": "Not so.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
    tree["paths"]["/v1/models"].pop("options", None)
    if locked:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, calls in tree["paths"].items():
            for call in calls.values() if path not in OPEN else ():
                call["security"] = [{"key": []}]
                call["responses"]["401"] = _problem("No valid API key.")
    return tree


def _problem(words: str) -> dict[str, Any]:
    return {"description": words, "content": {"application/json": {"schema": _reference("Error")}}}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _schema(kind: type[BaseModel], schemas: dict[str, Any], mode: Any = "validation") -> dict[str, str]:
    """Add a model, and what it is made of, under names of its own; returns the reference to it."""
    prefix = kind.__name__
    tree = kind.model_json_schema(ref_template=f"#/components/schemas/{prefix}.{{model}}", mode=mode)
    schemas |= {f"{prefix}.{name}": part for name, part in tree.pop("$defs", {}).items()}
    schemas[prefix] = tree
    return _reference(prefix)
