"""Who sent a request, for whatever answers it; the gate has found that out."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import Scope

from sglang.multimodal_gen.configs.declare import Surface
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import HttpSettings
from sglang.multimodal_gen.runtime.entrypoints.openai.keys import NOBODY, Caller

_CALLER = "caller"


def set_caller(scope: Scope, caller: Caller) -> None:
    """Remember whose request it is."""
    scope.setdefault("state", {})[_CALLER] = caller


def caller_of(request: Request) -> Caller:
    """Whose request it is. `id` separates what belongs to one key from what belongs to others."""
    caller: Caller = request.scope.get("state", {}).get(_CALLER, NOBODY)
    return caller


def surface_of(request: Request, settings: HttpSettings) -> Surface:
    """`admin` when the request carries the server's admin key, else `http`. Where the server has no keys, bearer tokens
    mean nothing: OpenAI's client sends one always."""
    return "admin" if caller_of(request).role == "admin" else "http"
