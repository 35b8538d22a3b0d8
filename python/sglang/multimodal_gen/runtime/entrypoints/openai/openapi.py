"""The OpenAPI page's schemas, made from the declarations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang.multimodal_gen.configs.declare import Parameter, parameters
from sglang.multimodal_gen.runtime.entrypoints.openai.fields import CallFields

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
# As every route's `default` response it also keeps FastAPI from documenting its own 422.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"description": "Any error.", "content": {"application/json": {"schema": ERROR_SCHEMA}}}
}


def request_body(call: CallFields, media_types: Iterable[str]) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes the call's fields."""
    schema = {
        "type": "object",
        "required": ["prompt"],
        "additionalProperties": False,
        "properties": {
            **{name: field_schema(parameter) for name, parameter in call.accepted.items()},
            **{name: _admin_schema(parameter) for name, parameter in call.admin_only.items()},
        },
    }
    return {"requestBody": {"required": True, "content": {media: {"schema": schema} for media in media_types}}}


def query(owner: type) -> dict[str, Any]:
    """The `openapi_extra` of a route with the query parameters that `owner` declares."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": field_schema(parameter)}
            for name, parameter in parameters(owner).items()
        ]
    }


def binary(media_types: Iterable[str]) -> dict[int | str, dict[str, Any]]:
    """The success response of a content route."""
    return {200: {"description": "The file's bytes.", "content": dict.fromkeys(media_types, _BINARY)}}


def field_schema(parameter: Parameter) -> dict[str, Any]:
    """One declared field as JSON schema."""
    declaration = parameter.declaration
    schema: dict[str, Any] = {"description": declaration.help}
    kinds = [_scalar(parameter, kind) for kind in parameter.types if kind is not tuple]
    if tuple in parameter.types:
        kinds.append({"type": "array", "items": {"anyOf": [_scalar(parameter, kind) for kind in parameter.item_types]}})
    if parameter.optional:
        kinds.append({"type": "null"})
    schema |= kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    if parameter.default is not None:
        schema["default"] = parameter.default
    return schema


def _admin_schema(parameter: Parameter) -> dict[str, Any]:
    schema = field_schema(parameter)
    return schema | {"description": f"{schema['description']} For administrators: needs the server's admin key."}


def _scalar(parameter: Parameter, kind: type) -> dict[str, Any]:
    declaration = parameter.declaration
    schema: dict[str, Any] = {"type": _TYPES[kind]}
    bounds: dict[str, Any]
    if kind is str:
        bounds = {"enum": declaration.choices and list(declaration.choices), "maxLength": declaration.max_length}
    else:
        bounds = {"minimum": declaration.minimum, "maximum": declaration.maximum}
    return schema | {key: value for key, value in bounds.items() if value is not None}
