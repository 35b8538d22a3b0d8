"""Who may use the fields for administrators."""

from __future__ import annotations

import hmac

from starlette.requests import Request

from sglang.multimodal_gen.configs.declare import Surface
from sglang.multimodal_gen.runtime.entrypoints.openai.engine import HttpSettings


def surface_of(request: Request, settings: HttpSettings) -> Surface:
    """`admin` when the request carries the server's admin key, else `http`. Other bearer tokens mean nothing here:
    OpenAI's client sends one always."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if settings.admin_api_key is None or scheme.lower() != "bearer":
        return "http"
    same = hmac.compare_digest(token.strip().encode(), settings.admin_api_key.encode())
    return "admin" if same else "http"
