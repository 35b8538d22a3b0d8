"""The OpenAPI page's schemas, made from the declarations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sglang.multimodal_gen.configs.declare import Parameter, parameters
from sglang.multimodal_gen.configs.sample.sampling_params import PARAMETERS_OF_SOME
from sglang.multimodal_gen.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidValue,
    NotReady,
    OperationInProgress,
    OutOfMemory,
    QueueFull,
    RequestCancelled,
    ServingError,
    StorageError,
)
from sglang.multimodal_gen.errors_http import (
    AdminRequired,
    BadHttp,
    BodyTimeout,
    BodyTooLarge,
    HeadTooLarge,
    HostNotAllowed,
    InvalidApiKey,
    ModelNotFound,
    RangeNotSatisfiable,
    TooManyConnections,
    UnsupportedMediaType,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.fields import CallFields
from sglang.multimodal_gen.runtime.entrypoints.openai.uploads import URL_KEYS, FileField

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object"}
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_STRING = {"type": "string"}
_FILE = {"type": "string", "format": "binary"}
_DATA_URL = {"type": "string", "description": "Data URL with the file's bytes in base64."}
_EXTRA = "extra_body"
_EXTRA_SCHEMA = {"description": "A JSON object of further fields, which stand beside the others.", "x-spelling": True}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Sent again with the same key, a call gets the first one's reply and runs once.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
_ERROR_CONTENT = {"application/json": {"schema": ERROR_SCHEMA}}
ALWAYS: tuple[type[ServingError], ...] = (
    BadHttp,
    InvalidApiKey,
    HostNotAllowed,
    TooManyConnections,
    HeadTooLarge,
    InternalError,
)
"""What any route may answer."""
READING: tuple[type[ServingError], ...] = (InvalidValue,)
CALLING: tuple[type[ServingError], ...] = (
    InvalidValue,
    AdminRequired,
    ModelNotFound,
    BodyTimeout,
    BodyTooLarge,
    UnsupportedMediaType,
    QueueFull,
    RequestCancelled,
    OutOfMemory,
    NotReady,
    DeadlineExceeded,
    StorageError,
)
"""What a call that generates may answer besides."""
CONTROLLING: tuple[type[ServingError], ...] = (
    InvalidValue,
    AdminRequired,
    BodyTimeout,
    OperationInProgress,
    BodyTooLarge,
    UnsupportedMediaType,
    NotReady,
)
_IN_WORDS = {
    400: "The request is at fault",
    401: "No key of this server",
    403: "Not allowed",
    404: "Not found",
    408: "The body came too slowly",
    409: "Another operation is under way",
    413: "Too large",
    415: "Another media type",
    416: "The range begins after the end",
    429: "Too much at once; see Retry-After",
    431: "The headers are too large",
    499: "Cancelled",
    500: "The server failed",
    503: "Not now; see x-should-retry",
    504: "Not done before the request's deadline, or the client's patience",
    507: "No room to save the result",
}

EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
"""The success response of a route that streams."""


def replies(*errors: type[ServingError], schema: Mapping[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: its success as JSON of this schema, and the statuses of these errors."""
    found: dict[int | str, dict[str, Any]] = {}
    if schema is not None:
        found[200] = {"description": "Success.", "content": {"application/json": {"schema": dict(schema)}}}
    for status in sorted({error.http_status for error in errors}):
        found[status] = {"description": _IN_WORDS[status], "content": _ERROR_CONTENT}
    return found


def tidied(page: dict[str, Any], *, open_paths: Collection[str], key_paths: Collection[str] | None) -> dict[str, Any]:
    """FastAPI's page without its own 422, and with what the gate does: `open_paths` need no key, `key_paths` (None: all
    the others) do."""
    page.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in page["paths"].items():
        needs_key = path not in open_paths if key_paths is None else path in key_paths
        for operation in item.values():
            operation["responses"].pop("422", None)
            if path in open_paths:
                for status in ("401", "403"):
                    operation["responses"].pop(status, None)
            if needs_key:
                operation["security"] = [{"key": []}]
    return page


def request_body(call: CallFields, media_types: Iterable[str]) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes the call's fields, under every spelling of theirs."""
    fields = {
        **{name: field_schema(parameter) for name, parameter in call.accepted.items()},
        **{name: _admin_schema(parameter) for name, parameter in call.admin_only.items()},
    }

    def schema(media_type: str) -> dict[str, Any]:
        spell = _in_json if media_type == "application/json" else _in_parts
        return {
            "type": "object",
            "required": ["prompt"],
            "additionalProperties": False,
            "properties": {**fields, **spell(fields, call.files.values())},
        }

    content = {media_type: {"schema": schema(media_type)} for media_type in media_types}
    return {"parameters": [_IDEMPOTENCY_KEY], "requestBody": {"required": True, "content": content}}


def _in_json(fields: Mapping[str, Any], files: Iterable[FileField]) -> dict[str, Any]:
    """The further properties of a JSON body: data URLs in place of files."""
    found: dict[str, Any] = {_EXTRA: _EXTRA_SCHEMA | {"type": ["object", "null"]}}
    for field in files:
        keyed = {**dict.fromkeys(URL_KEYS, _DATA_URL), **({"id": _STRING} if field.by_id else {})}
        forms = [_DATA_URL, *(_single_key(key, schema) for key, schema in keyed.items())]
        several = {"type": "array", "items": {"anyOf": forms}, "maxItems": field.max_files}
        found[field.name] = {"anyOf": [*forms, several, {"type": "null"}], "description": field.help}
        if field.alias is not None:
            found[field.alias] = found[field.name] | _other_spelling(f"Another name of {field.name}.")
    return found


def _in_parts(fields: Mapping[str, Any], files: Iterable[FileField]) -> dict[str, Any]:
    """The further properties of a multipart body: files, and the spellings of lists and objects."""
    found: dict[str, Any] = {_EXTRA: _EXTRA_SCHEMA | {"type": "string"}}
    for name, schema in fields.items():
        for kind in schema.get("anyOf", ()):
            if kind.get("type") == "array":
                found[f"{name}[]"] = kind | _other_spelling(f"Several of {name}, one a part.")
    for field in files:
        found[field.name] = _FILE | {"description": field.help}
        if field.max_files > 1:
            several = {"type": "array", "items": _FILE, "maxItems": field.max_files}
            found[f"{field.name}[]"] = several | _other_spelling(f"Several of {field.name}, one a part.")
        for key in (*URL_KEYS, *(["id"] if field.by_id else [])):
            found[f"{field.name}[{key}]"] = _STRING | _other_spelling(f"In place of {field.name}.")
    return found


def _other_spelling(description: str) -> dict[str, Any]:
    """What marks a property that says the same as another one."""
    return {"description": description, "x-spelling": True}


def _single_key(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [key], "additionalProperties": False, "properties": {key: dict(value)}}


def plain_body(owner: type) -> dict[str, Any]:
    """The `openapi_extra` of a route whose JSON body, which may be left out, has the fields that `owner` declares."""
    fields = {name: field_schema(parameter) for name, parameter in parameters(owner).items()}
    schema = {"type": "object", "additionalProperties": False, "properties": fields}
    return {"requestBody": {"required": False, "content": {"application/json": {"schema": schema}}}}


def query(owner: type) -> dict[str, Any]:
    """The `openapi_extra` of a route with the query parameters that `owner` declares."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": field_schema(parameter)}
            for name, parameter in parameters(owner).items()
        ]
    }


def binary(media_types: Iterable[str], *errors: type[ServingError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a content route: the bytes or a range of them, and the statuses of these errors."""
    content = {media_type: {"schema": _FILE} for media_type in media_types}
    return {
        200: {"description": "The file's bytes.", "content": content},
        206: {"description": "The range that was asked for.", "content": content},
        **replies(*errors, RangeNotSatisfiable),
    }


def field_schema(parameter: Parameter) -> dict[str, Any]:
    """One declared field as JSON schema. What forms need besides stands in extensions: the field's group, what happens
    while it is not given, and whether only some models take it."""
    declaration = parameter.declaration
    schema: dict[str, Any] = {"description": declaration.help, "x-group": declaration.group}
    if declaration.unset:
        schema["x-unset"] = declaration.unset
    if parameter.name in PARAMETERS_OF_SOME:
        schema["x-of-some-models"] = True
    kinds = [_scalar(parameter, kind) for kind in parameter.types if kind is not tuple]
    if tuple in parameter.types:
        items = {"anyOf": [_scalar(parameter, kind) for kind in parameter.item_types]}
        most = {} if declaration.max_items is None else {"maxItems": declaration.max_items}
        kinds.append({"type": "array", "items": items, **most})
    if parameter.optional:
        kinds.append({"type": "null"})
    schema |= kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    if parameter.default is not None:
        schema["default"] = parameter.default
    return schema


def _admin_schema(parameter: Parameter) -> dict[str, Any]:
    schema = field_schema(parameter)
    described = f"{schema['description']} For administrators: needs the server's admin key."
    return schema | {"description": described, "x-admin": True}


def _scalar(parameter: Parameter, kind: type) -> dict[str, Any]:
    declaration = parameter.declaration
    schema: dict[str, Any] = {"type": _TYPES[kind]}
    bounds: dict[str, Any]
    if kind is dict:
        keys = {} if declaration.keys is None else parameters(declaration.keys)
        known = {name: field_schema(key) for name, key in keys.items()}
        bounds = {"properties": known, "additionalProperties": False} if known else {}
    elif kind is str:
        bounds = {"enum": declaration.choices and list(declaration.choices), "maxLength": declaration.max_length}
    else:
        bounds = {"minimum": declaration.minimum, "maximum": declaration.maximum}
    return schema | {key: value for key, value in bounds.items() if value is not None}
