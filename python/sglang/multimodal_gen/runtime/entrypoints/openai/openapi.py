"""The OpenAPI page's schemas, made from the declarations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang.multimodal_gen.configs.declare import Parameter, parameters
from sglang.multimodal_gen.runtime.entrypoints.openai.fields import CallFields
from sglang.multimodal_gen.runtime.entrypoints.openai.uploads import FileField

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

EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
"""The success response of a route that streams."""


def request_body(call: CallFields, media_types: Iterable[str]) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes the call's fields."""
    fields = {
        **{name: field_schema(parameter) for name, parameter in call.accepted.items()},
        **{name: _admin_schema(parameter) for name, parameter in call.admin_only.items()},
    }

    def schema(media_type: str) -> dict[str, Any]:
        files = {name: _file_schema(field, media_type) for name, field in call.files.items()}
        return {
            "type": "object",
            "required": ["prompt"],
            "additionalProperties": False,
            "properties": {**fields, **files},
        }

    content = {media_type: {"schema": schema(media_type)} for media_type in media_types}
    return {"requestBody": {"required": True, "content": content}}


def _file_schema(field: FileField, media_type: str) -> dict[str, Any]:
    """A file in a multipart body, a data URL in JSON."""
    if media_type == "application/json":
        one: dict[str, Any] = {"type": "string", "description": "Data URL with the file's bytes in base64."}
    else:
        one = {"type": "string", "format": "binary"}
    described = {"description": field.help}
    if field.max_files == 1:
        return one | described
    return {"anyOf": [one, {"type": "array", "items": one, "maxItems": field.max_files}]} | described


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
