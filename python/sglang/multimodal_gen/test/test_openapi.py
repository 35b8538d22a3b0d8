"""The page that describes the API is true: generated requests get documented replies, and no route is left out."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sglang.multimodal_gen.runtime.entrypoints.openai.gate import ADMIN_PATHS, OPEN_PATHS
from sglang.multimodal_gen.test.scripted_server import RunningServer, Start

ADMIN_KEY = "correct-horse-battery"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def server(start_server: Start) -> RunningServer:
    return start_server(admin_api_key=ADMIN_KEY)


@pytest.fixture(scope="module")
def described(server: RunningServer) -> Any:
    """The server's own page."""
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


def test_generated_requests_get_documented_replies(described: Any) -> None:
    """Some of them valid, some not, for each operation of the page."""
    operations = [result.ok() for result in described.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:
        _send_generated(operation)


def _send_generated(operation: Any) -> None:
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    strategies = [operation.as_strategy(generation_mode=mode) for mode in modes]

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategies[0] | strategies[1])
    def send(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=ADMIN, checks=list(CHECKS), timeout=10)

    send()


def test_every_route_lists_its_errors(server: RunningServer) -> None:
    page = server.client.get("/openapi.json").json()
    assert page["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    for path, item in page["paths"].items():
        for method, operation in item.items():
            statuses = set(operation["responses"])
            assert not statuses & {"422", "default"}, "bad input is 400 here, and nothing is left to guess"
            assert statuses >= {"200", "400", "429", "431", "500"}, (method, path)
            assert ({"401", "403"} <= statuses) == (path not in OPEN_PATHS)
            if method == "post":
                assert statuses >= {"408", "413", "415", "503"}, path
                generates = path not in ADMIN_PATHS
                assert (statuses >= {"499", "504", "507"}) == generates, path
                headers = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "header"}
                assert ("Idempotency-Key" in headers) == generates, path
            if method == "delete":
                assert statuses >= {"503", "507"}, "results may be in a store that does not answer"
            if path == "/v1/videos/{video_id}/content":
                assert "503" in statuses
            if "{" in path:
                assert "404" in statuses, path
            assert ("security" in operation) == (path in ADMIN_PATHS)
            for status, reply in operation["responses"].items():
                assert reply["description"], (path, status)
    assert set(page["paths"]) >= ADMIN_PATHS and set(page["paths"]) >= OPEN_PATHS


JPEG = "data:image/jpeg;base64,aaaa"


@pytest.mark.parametrize(
    ("path", "media_type", "body"),
    [
        ("images/generations", "application/json", {"extra_body": {"seed": 1}, "quality": "standard"}),
        *(
            ("images/edits", "application/json", fields)
            for fields in (
                {"image": JPEG},
                {"image": {"image_url": JPEG}},
                {"images": [{"image_url": JPEG}, JPEG]},
                {"image": [JPEG], "images": None, "mask": {"image_url": JPEG}, "seed": [1, 2]},
            )
        ),
        ("videos", "application/json", {"input_reference": {"image_url": JPEG}, "last_image": None}),
        ("videos/edits", "application/json", {"video": {"id": "video_1"}}),
        ("videos/extensions", "application/json", {"video_id": "video_1", "seconds": 4}),
        ("images/edits", "multipart/form-data", {"image[]": ["…", "…"], "mask": "…", "extra_body": "{}"}),
        ("videos", "multipart/form-data", {"input_reference[image_url]": JPEG, "skip_guidance_layers[]": [1]}),
        ("videos/extensions", "multipart/form-data", {"video[id]": "video_1"}),
    ],
)
def test_the_page_takes_what_the_routes_take(
    server: RunningServer, path: str, media_type: str, body: dict[str, Any]
) -> None:
    page = server.client.get("/openapi.json").json()
    schema = page["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"][media_type]["schema"]
    jsonschema.Draft202012Validator(schema).validate({"prompt": "a", **body})
    for wrong in ({"no_such_field": 1}, {"video": {"url": "x"}}, {"prompt": 5}):
        assert not jsonschema.Draft202012Validator(schema).is_valid({"prompt": "a", **body, **wrong})


def test_a_server_with_keys_says_so_on_the_page(start_server: Start) -> None:
    key = "a-key-of-some-user"
    server = start_server(api_keys=(key,))
    page = server.client.get("/openapi.json", headers={"authorization": f"Bearer {key}"}).json()
    for path, item in page["paths"].items():
        for operation in item.values():
            assert ("security" in operation) == (path not in OPEN_PATHS), path
    assert key not in json.dumps(page)
