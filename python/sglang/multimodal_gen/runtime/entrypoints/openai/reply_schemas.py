"""JSON schemas of what the routes answer, for the OpenAPI page: what a client may rely on; more may be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STRING, _NUMBER, _INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_STRINGS = {"type": "array", "items": _STRING}


def _object(**properties: Any) -> dict[str, Any]:
    """All of them are always there."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(schema), {"type": "null"}]}


LIVENESS = _object(status={"const": "ok"})
HEALTHY = _object(status={"const": "ok"}, state={"const": "ready"})
UNHEALTHY = _object(status={"const": "unavailable"}, state=_STRING)
GENERATES = _object(status={"const": "ok"}, state={"const": "ready"}, inference_time_s=_NUMBER)
MODEL_PATH = _object(model_path=_STRING)
MODEL_INFO = _object(
    model_path=_STRING,
    is_generation={"const": True},
    model_type={"const": "diffusion"},
    architectures=_nullable(_STRINGS),
    has_image_understanding={"type": "boolean"},
    has_audio_understanding={"const": False},
    task_type=_nullable(_STRING),
    supported_task_types=_STRINGS,
    output_types=_STRINGS,
    is_image_gen={"type": "boolean"},
)
SERVER_INFO = _object(
    model_path=_STRING,
    tp_size=_INTEGER,
    dp_size=_INTEGER,
    served_model_name=_STRING,
    state=_STRING,
    started_at=_INTEGER,
    uptime_s=_NUMBER,
    model=_nullable({"type": "object"}),
    limits={"type": "object"},
    queue=_nullable(_object(queued=_INTEGER, running=_INTEGER)),
    memory=_nullable({"type": "object"}),
    workers=_nullable({"type": "object"}),
)
DONE = _object(success={"const": True}, message=_STRING)
LORAS_DONE = _object(status={"const": "ok"}, message=_STRING)
LORAS = _object(
    loaded_adapters={"type": "array", "items": _object(nickname=_STRING, path=_STRING, target=_STRING)},
    active={
        "type": "object",
        "additionalProperties": {
            "type": "array",
            "items": _object(
                nickname=_STRING,
                path=_STRING,
                strength={"type": "number"},
                merged={"type": "boolean"},
                mode={"enum": ["merged", "unmerged"]},
            ),
        },
    },
)
MODEL = _object(id=_STRING, object={"const": "model"}, created=_INTEGER, owned_by=_STRING)
MODELS = _object(object={"const": "list"}, data={"type": "array", "items": MODEL})
IMAGES = _object(
    created=_INTEGER,
    data={
        "type": "array",
        "items": _object(b64_json=_nullable(_STRING), url=_nullable(_STRING), seed=_INTEGER, notes=_STRINGS),
    },
    output_format=_STRING,
    size=_STRING,
)
VIDEO = _object(
    id=_STRING,
    object={"const": "video"},
    created_at=_INTEGER,
    model=_STRING,
    status={"enum": ["queued", "in_progress", "completed", "failed"]},
    progress={"type": "integer", "minimum": 0, "maximum": 100},
    seconds=_STRING,
    size=_STRING,
    error=_nullable({"type": "object"}),
)
VIDEOS = _object(
    object={"const": "list"},
    data={"type": "array", "items": VIDEO},
    first_id=_nullable(_STRING),
    last_id=_nullable(_STRING),
    has_more={"type": "boolean"},
)
VIDEO_DELETED = _object(id=_STRING, object={"const": "video.deleted"}, deleted={"const": True})
