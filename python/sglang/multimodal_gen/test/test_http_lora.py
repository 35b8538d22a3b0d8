"""The routes for adapters, and the field by which requests name them, on a scripted engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors_lora import InvalidLora
from sglang.multimodal_gen.runtime.managers.messages import LoraRequest, LoraWish
from sglang.multimodal_gen.test.scripted_server import READY, RunningServer, Start, error_of

ADMIN_KEY = "an-admin-key-of-24-chars"
IMAGES = "/v1/images/generations"


@pytest.fixture
def server(start_server: Start) -> RunningServer:
    return start_server(admin_api_key=ADMIN_KEY)


@pytest.fixture
def admin(server: RunningServer) -> Iterator[httpx.Client]:
    server.engine.state = READY
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=server.client.base_url, headers=headers) as client:
        yield client


def asked(server: RunningServer) -> LoraRequest:
    [(_, request)] = server.engine.operations
    assert isinstance(request, LoraRequest)
    return request


def last(server: RunningServer) -> SamplingParams:
    return list(server.engine.submitted.values())[-1]


def test_setting_says_which_adapters_and_how(admin: httpx.Client, server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    body = {
        "lora_nickname": ["a", "b"],
        "lora_path": [str(tmp_path / "x" / ".." / "a.safetensors"), "owner/b"],
        "target": ["transformer", "all"],
        "strength": [0.5, 2],
        "merge_mode": "merge",
        "lora_alpha": 8,
        "lora_weight_name": None,
    }
    (tmp_path / "x").mkdir()
    assert admin.post("/v1/set_lora", json=body).json() == {"status": "ok", "message": "done"}
    first = LoraWish(name="a", scale=0.5, path=str(tmp_path / "a.safetensors"), alpha=8.0, target="transformer")
    second = LoraWish(name="b", scale=2.0, path="owner/b", alpha=8.0)
    assert asked(server) == LoraRequest(query_id="", operation="set", adapters=(first, second), merge=True)


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("set_lora", {"lora_nickname": []}, LoraRequest(query_id="", operation="set")),
        ("set_lora", {"lora_nickname": "a"}, LoraRequest(query_id="", operation="set", adapters=(LoraWish(name="a"),))),
        ("merge_lora_weights", {"strength": 0.5}, LoraRequest(query_id="", operation="merge", scale=0.5)),
        ("merge_lora_weights", None, LoraRequest(query_id="", operation="merge")),
        ("unmerge_lora_weights", {"target": "all"}, LoraRequest(query_id="", operation="unmerge")),
        (
            "remove_lora",
            {"lora_nickname": ["a"]},
            LoraRequest(query_id="", operation="remove", adapters=(LoraWish(name="a"),)),
        ),
    ],
)
def test_the_other_operations_reach_the_engine(
    admin: httpx.Client, server: RunningServer, path: str, body: Any, expected: LoraRequest
) -> None:
    assert (
        admin.post(f"/v1/{path}", json=body).json()["status"] == "ok"
        if body is not None
        else (admin.post(f"/v1/{path}").json()["status"] == "ok")
    )
    assert asked(server) == expected


def test_the_list_says_what_is_loaded_and_what_is_active(admin: httpx.Client) -> None:
    path = "/a/mine.safetensors"
    entry = {"nickname": "mine", "path": path, "strength": 0.5, "merged": False, "mode": "unmerged"}
    assert admin.get("/v1/list_loras").json() == {
        "loaded_adapters": [{"nickname": "mine", "path": path, "target": "all"}],
        "active": {"all": [entry]},
    }


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("set_lora", {}, "missing_required_parameter", "lora_nickname"),
        ("set_lora", {"lora_nickname": "a b"}, "invalid_value", "lora_nickname"),
        ("set_lora", {"lora_nickname": 3}, "invalid_type", "lora_nickname"),
        ("set_lora", {"lora_nickname": "a", "strength": "much"}, "invalid_type", "strength"),
        ("set_lora", {"lora_nickname": "a", "strength": [1, 2]}, "invalid_value", "strength"),
        ("set_lora", {"lora_nickname": "a", "strength": 1e9}, "out_of_range", "strength"),
        ("set_lora", {"lora_nickname": ["a"] * 17}, "invalid_value", "lora_nickname"),
        ("set_lora", {"lora_nickname": "a", "no_such": 1}, "unknown_parameter", "no_such"),
        ("merge_lora_weights", {"target": "transformer"}, "unsupported_parameter", "target"),
        ("unmerge_lora_weights", {"target": "critic"}, "unsupported_parameter", "target"),
        ("remove_lora", {}, "missing_required_parameter", "lora_nickname"),
    ],
)
def test_bad_fields_are_refused_at_the_door(
    *, admin: httpx.Client, server: RunningServer, path: str, body: dict[str, Any], code: str, param: str
) -> None:
    error = error_of(admin.post(f"/v1/{path}", json=body), 400)
    assert (error["code"], error["param"]) == (code, param)
    assert not server.engine.operations


def test_what_the_engine_refuses_is_a_bad_request(admin: httpx.Client, server: RunningServer) -> None:
    server.engine.refusal = InvalidLora("a.safetensors is truncated")
    error = error_of(admin.post("/v1/set_lora", json={"lora_nickname": "a", "lora_path": "x"}), 400)
    assert (error["code"], error["param"]) == ("invalid_lora", "lora_path")


def test_requests_name_adapters(admin: httpx.Client, server: RunningServer) -> None:
    lora = ["a", "b:-0.5", {"name": "c", "scale": 2}]
    assert admin.post(IMAGES, json={"prompt": "a", "lora": lora}).status_code == 200
    assert [tuple(use) for use in last(server).lora_uses] == [("a", 1.0), ("b", -0.5), ("c", 2.0)]
    assert admin.post(IMAGES, json={"prompt": "a", "lora": []}).status_code == 200
    assert last(server).lora == ()
    assert admin.post(IMAGES, json={"prompt": "a"}).status_code == 200
    assert last(server).lora is None


@pytest.mark.parametrize(
    ("lora", "code"),
    [
        ("a", "invalid_type"),
        ([1], "invalid_type"),
        ([{"name": "a", "scale": "x"}], "invalid_value"),
        ([{"name": "a", "scale": True}], "invalid_value"),
        ([{"name": "a", "scale": 101}], "invalid_value"),
        ([{"scale": 1}], "invalid_value"),
        ([{"name": "a", "weight": 1}], "invalid_value"),
        (["a:"], "invalid_value"),
        (["a:nan"], "invalid_value"),
        (["../a"], "invalid_value"),
        (["a"] * 17, "invalid_value"),
    ],
)
def test_adapters_that_cannot_be_named_so_are_refused(server: RunningServer, lora: Any, code: str) -> None:
    error = error_of(server.client.post(IMAGES, json={"prompt": "a", "lora": lora}), 400)
    assert (error["code"], error["param"]) == (code, "lora")
