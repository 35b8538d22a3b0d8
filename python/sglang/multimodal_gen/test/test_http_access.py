"""Who may use the server over HTTP: keys, the administrator's routes, names of the host, origins of web pages."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang.multimodal_gen.errors import InvalidValue, OperationInProgress
from sglang.multimodal_gen.errors_http import InvalidKeyFile
from sglang.multimodal_gen.runtime.entrypoints.cli import serve as serve_command
from sglang.multimodal_gen.runtime.entrypoints.http_main import _settings
from sglang.multimodal_gen.runtime.entrypoints.openai.gate import (
    ADMIN_PATHS,
    LORA_PATHS,
    OPEN_PATHS,
    host_name,
    hosts_for,
)
from sglang.multimodal_gen.runtime.entrypoints.openai.keys import Keys, read_key_file
from sglang.multimodal_gen.runtime.launch_server import _with_keys, is_exposed
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.server_args import HttpArgs, ServerArgs
from sglang.multimodal_gen.test.scripted_server import READY, RunningServer, Start, assert_error, error_of

USER_KEYS = ("first-key-of-a-user", "second-key-of-a-user")
ADMIN_KEY = "correct-horse-battery"
IMAGES, VIDEOS = "/v1/images/generations", "/v1/videos"


@pytest.fixture(scope="module")
def open_server(start_server: Start) -> RunningServer:
    """One without any key."""
    return start_server()


@pytest.fixture(scope="module")
def keyed_server(start_server: Start) -> RunningServer:
    """One whose clients need a key."""
    return start_server(api_keys=USER_KEYS, admin_api_key=ADMIN_KEY)


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


# --- keys ---

EVERY_ROUTE = [
    *(("GET", path) for path in ("/metrics", "/server_info", "/health_generate", "/v1/models", "/v1/models/tiny",
                                 "/models", "/model_info", "/v1/model_info",
                                 VIDEOS, "/v1/videos/x", "/v1/videos/x/content", "/v1/videos/x/events",
                                 "/v1/images/x/content",
                                 "/openapi.json", "/no/such/route")),
    *(("POST", path) for path in (IMAGES, "/v1/images/edits", VIDEOS, "/v1/videos/edits", "/v1/videos/extensions",
                                  "/v1/videos/x/remix", *sorted(ADMIN_PATHS))),
    ("DELETE", "/v1/videos/x"),
    ("PUT", VIDEOS),
]  # fmt: skip


@pytest.mark.parametrize("key", [None, "not-a-key-of-this-server", USER_KEYS[0][:-1], USER_KEYS[0] + "x", "ü" * 16])
@pytest.mark.parametrize(("method", "path"), EVERY_ROUTE)
def test_nothing_but_the_probes_answers_without_a_key(
    keyed_server: RunningServer, method: str, path: str, key: str | None
) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
    reply = keyed_server.client.request(method, path, headers=headers)
    error = error_of(reply, 401)
    assert (error["code"], error["param"]) == ("invalid_api_key", None)
    assert reply.headers["www-authenticate"] == "Bearer"
    assert key is None or key not in reply.text


def test_the_page_for_browsers_needs_no_key_and_asks_for_it_itself(keyed_server: RunningServer) -> None:
    for path in ("/studio", "/studio/index.html", "/"):
        assert keyed_server.client.get(path).status_code in (200, 307)
    for path in ("/studios", "/v1/studio", "/studio/../v1/models"):
        assert_error(keyed_server.client.get(path), 401, "invalid_api_key")


def test_every_route_of_the_page_is_in_the_list_above(open_server: RunningServer) -> None:
    page = open_server.client.get("/openapi.json").json()
    listed = {path.replace("/x", "/{id}") for _, path in EVERY_ROUTE}
    ids = ("{video_id}", "{image_id}")
    for path in page["paths"]:
        for name in ids:
            path = path.replace(name, "{id}")
        assert path in OPEN_PATHS or path in listed or path == "/v1/models/{model_id}", path


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_the_probes_answer_without_a_key(keyed_server: RunningServer, path: str) -> None:
    assert keyed_server.client.get(path).status_code == 200
    assert keyed_server.client.get(path, headers=bearer("wrong")).status_code == 200


@pytest.mark.parametrize("key", [*USER_KEYS, ADMIN_KEY])
def test_each_key_opens_the_routes_of_users(keyed_server: RunningServer, key: str) -> None:
    headers = {"authorization": f"bearer  {key}"}
    for path in ("/v1/models", "/server_info", "/metrics"):
        assert keyed_server.client.get(path, headers=headers).status_code == 200
    assert keyed_server.client.post(IMAGES, json={"prompt": "a"}, headers=headers).status_code == 200
    assert error_of(keyed_server.client.get("/no/such/route", headers=headers), 404)["code"] == "not_found"


@pytest.mark.parametrize("key", USER_KEYS)
@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_a_users_key_does_not_open_the_administrators_routes(keyed_server: RunningServer, path: str, key: str) -> None:
    error = error_of(keyed_server.client.post(path, headers=bearer(key)), 403)
    assert (error["code"], error["param"]) == ("admin_required", None)
    assert not keyed_server.engine.operations


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_without_any_key_nobody_is_the_administrator(open_server: RunningServer, path: str) -> None:
    for key in (None, "None", "anything"):
        assert error_of(open_server.client.post(path, headers=bearer(key)), 403)["code"] == "admin_required"
    assert not open_server.engine.operations


def test_a_server_with_an_admin_key_alone_is_open_to_users(start_server: Start) -> None:
    server = start_server(admin_api_key=ADMIN_KEY)
    assert server.post_image().status_code == 200
    assert server.client.get("/v1/models", headers=bearer("unused")).status_code == 200
    for key in (None, "unused"):
        error = error_of(server.client.post("/flush_cache", headers=bearer(key)), 401)
        assert error["code"] == "invalid_api_key"
    assert server.client.post("/flush_cache", headers=bearer(ADMIN_KEY)).json() == {"success": True, "message": "done"}


def test_an_upload_without_a_key_gets_its_answer_and_the_connection_ends(keyed_server: RunningServer) -> None:
    head = f"POST {VIDEOS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
    began = time.monotonic()
    answer = keyed_server.exchange(head.encode() + b"x" * 100, timeout_s=30)  # until the server closes
    assert answer.startswith(b"HTTP/1.1 401 ") and b'"invalid_api_key"' in answer
    assert time.monotonic() - began < 20
    reply = keyed_server.client.post(VIDEOS, content=b"x" * 3_000_000, headers={"content-type": "application/json"})
    assert error_of(reply, 401)["code"] == "invalid_api_key"


def test_one_callers_idempotency_key_is_nothing_to_another(keyed_server: RunningServer) -> None:
    def post(key: str, prompt: str) -> httpx.Response:
        headers = {**bearer(key), "idempotency-key": "shared"}
        return keyed_server.client.post(VIDEOS, json={"prompt": prompt}, headers=headers)

    first, other = post(USER_KEYS[0], "a"), post(USER_KEYS[1], "b")
    assert first.status_code == other.status_code == 200
    assert first.json()["id"] != other.json()["id"]
    assert post(USER_KEYS[0], "a").json()["id"] == first.json()["id"]


def test_callers_are_told_apart_without_their_keys() -> None:
    keys = Keys(USER_KEYS, ADMIN_KEY)
    callers = [keys.caller(f"Bearer {key}") for key in (*USER_KEYS, ADMIN_KEY)]
    assert [caller.role for caller in callers] == ["user", "user", "admin"]
    ids = [caller.id for caller in callers]
    assert len(set(ids)) == 3 and ids == [Keys(USER_KEYS, ADMIN_KEY).caller(f"Bearer {k}").id for k in
                                          (*USER_KEYS, ADMIN_KEY)]  # fmt: skip
    assert keys.caller("Basic x").id is None and keys.caller("Bearer ").role is None
    assert Keys((ADMIN_KEY,), ADMIN_KEY).caller(f"Bearer {ADMIN_KEY}").role == "admin"


def test_keys_are_in_no_log(keyed_server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in (USER_KEYS[0], ADMIN_KEY, "sk-a-mistyped-secret"):
            keyed_server.client.get("/v1/models", headers=bearer(key))
    assert not [key for key in (*USER_KEYS, ADMIN_KEY, "sk-a-mistyped-secret") if key in caplog.text]


# --- the file of keys, and the options ---


def test_the_keys_of_a_file_are_added_to_the_others(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the studio\n\n  key-of-the-studio-1  \nkey-of-the-studio-2\r\nkey-of-the-studio-1\n")
    http = _with_keys(HttpArgs(api_key=(USER_KEYS[0],), api_key_file=str(path)))
    assert http.api_key == (USER_KEYS[0], "key-of-the-studio-1", "key-of-the-studio-2")
    assert _with_keys(HttpArgs()).api_key is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no key"),
        (b"# only a comment\n", "holds no key"),
        (b"good-key-good-key\nsecret\n", "line 2"),
        (b"a key with spaces in it\n", "line 1"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_of_keys_stops_the_start_and_is_not_quoted(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidKeyFile) as raised:
        read_key_file(str(path))
    assert expected in str(raised.value) and "secret" not in str(raised.value)


def test_secrets_are_not_shown_with_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--api-key", USER_KEYS[0], "--api-key", USER_KEYS[1], "--admin-api-key", ADMIN_KEY, "--print-config"]
    job = serve_command.configure(arguments)
    assert job.resolved.args.http.api_key == USER_KEYS
    assert job.run() == 0
    shown = capsys.readouterr().out
    assert "# api_key: ***" in shown and "# admin_api_key: ***" in shown
    assert not [key for key in (*USER_KEYS, ADMIN_KEY) if key in shown + repr(job.resolved.args)]
    with pytest.raises(InvalidValue) as raised:
        serve_command.configure(["--api-key", "short"])
    assert "short" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "key", "exposed"),
    [
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.0.2.7", None, True),
        ("192.0.2.7", USER_KEYS, False),
    ],
)
def test_a_server_that_others_may_reach_without_a_key_is_told(
    address: str, key: tuple[str, ...] | None, exposed: bool
) -> None:
    assert is_exposed(HttpArgs(host=address, api_key=key), address) is exposed


def test_the_options_reach_the_server(tmp_path: Path) -> None:
    http = HttpArgs(
        api_key=USER_KEYS,
        admin_api_key=ADMIN_KEY,
        allowed_host=("images.example.com",),
        cors_origin=("https://studio.example.com",),
        header_timeout_s=3.0,
        body_timeout_s=4.0,
        max_header_kib=8,
        max_upload_mib=16,
        max_connections_per_ip=5,
        shutdown_grace_s=6.0,
    )
    config = EngineConfig(args=ServerArgs(http=http), run_dir=str(tmp_path), sources={"port": "flag"})
    settings = _settings(config, "0.0.0.0")
    assert (settings.api_keys, settings.admin_api_key) == (USER_KEYS, ADMIN_KEY)
    assert settings.allowed_hosts is not None and "images.example.com" in settings.allowed_hosts
    assert settings.cors_origins == {"https://studio.example.com"}
    assert (settings.header_timeout_s, settings.body.timeout_s, settings.shutdown_grace_s) == (3.0, 4.0, 6.0)
    assert (settings.max_header_bytes, settings.max_connections_per_ip) == (8192, 5)
    assert (settings.body.max_upload_bytes, settings.body.max_json_upload_bytes) == (16 * 2**20, 4 * 2**20)
    assert settings.options["port"] == {"value": 30000, "source": "flag"}
    assert settings.options["api_key"]["value"] == settings.options["admin_api_key"]["value"] == "***"
    assert not [key for key in (*USER_KEYS, ADMIN_KEY) if key in json.dumps(settings.options) + repr(settings)]


# --- the administrator's routes ---


@pytest.fixture
def admin(keyed_server: RunningServer) -> Iterator[httpx.Client]:
    """The administrator's client of the server with keys."""
    keyed_server.engine.operations.clear()
    keyed_server.engine.refusal, keyed_server.engine.state = None, READY
    with httpx.Client(base_url=keyed_server.client.base_url, headers=bearer(ADMIN_KEY)) as client:
        yield client
    keyed_server.engine.operations.clear()
    keyed_server.engine.refusal = None


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS - LORA_PATHS))
def test_an_operation_reaches_the_engine_and_is_answered(
    admin: httpx.Client, keyed_server: RunningServer, path: str
) -> None:
    for body in ({}, {"json": {}}):
        assert admin.post(path, **body).json() == {"success": True, "message": "done"}
    assert keyed_server.engine.operations == [(path.removeprefix("/"), None)] * 2
    keyed_server.engine.refusal = OperationInProgress("release_memory_occupation is under way; wait until it is done")
    reply = admin.post(path)
    assert error_of(reply, 409)["code"] == "operation_in_progress"
    assert reply.headers["x-should-retry"] == "false", "clients retry 409"
    assert admin.get(path).status_code == 405


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS - LORA_PATHS))
@pytest.mark.parametrize(
    ("content", "content_type", "status", "code", "param"),
    [
        (b'{"x": 1}', "application/json", 400, "unknown_parameter", "x"),
        (b'{"x": null}', "application/json", 400, "unknown_parameter", "x"),
        (b"junk", "application/json", 400, "invalid_json", None),
        (b"[]", "application/json", 400, "invalid_json", None),
        (b"x=1", "application/x-www-form-urlencoded", 415, "unsupported_media_type", None),
    ],
)
def test_an_operation_ignores_nothing_that_it_is_sent(
    *, admin: httpx.Client, keyed_server: RunningServer, path: str, content: bytes, content_type: str, status: int,
    code: str, param: str | None,
) -> None:  # fmt: skip
    error = error_of(admin.post(path, content=content, headers={"content-type": content_type}), status)
    assert (error["code"], error["param"]) == (code, param)
    assert error_of(admin.post(f"{path}?x=1"), 400)["code"] == "unknown_parameter"
    assert not keyed_server.engine.operations


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"model_path": "/no/such/directory"}, "invalid_value", "model_path"),
        ({"model_path": "org/model"}, "invalid_value", "model_path"),
        ({"model_path": 3}, "invalid_type", "model_path"),
        ({"flush_cache": False}, "unsupported_parameter", "flush_cache"),
        ({"target_modules": ["transformer"]}, "unsupported_parameter", "target_modules"),
        ({"no_such_field": 1}, "unknown_parameter", "no_such_field"),
    ],
)
def test_a_bad_update_of_the_weights_is_refused_at_the_door(
    admin: httpx.Client, keyed_server: RunningServer, body: dict[str, Any], code: str, param: str
) -> None:
    error = error_of(admin.post("/update_weights_from_disk", json=body), 400)
    assert (error["code"], error["param"]) == (code, param)
    assert not keyed_server.engine.operations


def test_a_directory_of_another_pipeline_is_refused_at_the_door(
    admin: httpx.Client, keyed_server: RunningServer, tmp_path: Path
) -> None:
    path = tmp_path / "other"
    path.mkdir()
    error = error_of(admin.post("/update_weights_from_disk", json={"model_path": str(path)}), 400)
    assert error["code"] == "not_a_model"
    (path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    error = error_of(admin.post("/update_weights_from_disk", json={"model_path": str(path)}), 400)
    assert (error["code"], "FluxPipeline" in error["message"]) == ("weights_do_not_fit", True)
    (path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    assert admin.post("/update_weights_from_disk", json={"model_path": str(path)}).status_code == 200
    assert keyed_server.engine.operations == [("update_weights_from_disk", str(path))]


# --- names of the host ---


@pytest.mark.parametrize(
    ("listen", "address", "extra", "accepted", "refused"),
    [
        ("127.0.0.1", "127.0.0.1", None, ["localhost", "127.0.0.1", "::1"], ["evil.example", "192.0.2.7"]),
        ("gpu-7", "192.0.2.7", None, ["gpu-7", "192.0.2.7", "localhost"], ["evil.example"]),
        ("0.0.0.0", "0.0.0.0", ("images.example",), ["images.example", "localhost"], ["192.0.2.7", "evil.example"]),
    ],
)
def test_the_names_of_a_server(
    listen: str, address: str, extra: tuple[str, ...] | None, accepted: list[str], refused: list[str]
) -> None:
    names = hosts_for(listen, address, extra)
    assert names is not None and names.issuperset(accepted) and names.isdisjoint(refused)


@pytest.mark.parametrize(
    ("address", "extra"), [("0.0.0.0", None), ("::", None), ("127.0.0.1", ("*",)), ("192.0.2.7", ("a.example", "*"))]
)
def test_some_servers_go_by_any_name(address: str, extra: tuple[str, ...] | None) -> None:
    assert hosts_for(address, address, extra) is None


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost:30000", "localhost"),
        ("LOCALHOST", "localhost"),
        ("[::1]:30000", "::1"),
        ("[::1]", "::1"),
        ("images.example.:80", "images.example"),
        ("", ""),
    ],
)
def test_the_name_in_a_host_header(header: str, name: str) -> None:
    assert host_name(header) == name


def test_a_page_whose_name_was_made_to_point_here_is_refused(start_server: Start) -> None:
    server = start_server(allowed_hosts=hosts_for("127.0.0.1", "127.0.0.1", None))
    for host in ("evil.example", "evil.example:30000", "127.0.0.1.evil.example", "localhost@evil.example", ""):
        for method, path in (("GET", "/v1/models"), ("POST", IMAGES), ("GET", "/no/such/route")):
            error = error_of(server.client.request(method, path, headers={"host": host}), 403)
            assert (error["code"], error["param"]) == ("host_not_allowed", None)
        assert server.client.get("/health", headers={"host": host}).status_code == 200
    for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]:30000"):
        assert server.client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--allowed-host", "http://images.example"),
        ("--allowed-host", "images.example:80"),
        ("--cors-origin", "studio.example"),
        ("--cors-origin", "*"),
        ("--cors-origin", "https://studio.example/"),
        ("--cors-origin", "https://Studio.example"),
    ],
)
def test_what_is_no_name_and_no_origin_is_refused(flag: str, value: str) -> None:
    with pytest.raises(InvalidValue):
        serve_command.configure([flag, value])


# --- origins of web pages ---

STUDIO = "https://studio.example.com"


@pytest.fixture(scope="module")
def studio_server(start_server: Start) -> RunningServer:
    """One that pages of the studio may use, with a key."""
    return start_server(cors_origins=frozenset({STUDIO}), api_keys=USER_KEYS)


def test_a_page_of_an_allowed_origin_may_use_the_server(studio_server: RunningServer) -> None:
    asked = {"origin": STUDIO, "access-control-request-method": "POST",
             "access-control-request-headers": "authorization, content-type"}  # fmt: skip
    preflight = studio_server.client.options(IMAGES, headers=asked)
    assert (preflight.status_code, preflight.content) == (204, b"")
    assert preflight.headers["access-control-allow-origin"] == STUDIO
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "access-control-allow-credentials" not in preflight.headers
    for headers, status in ((bearer(USER_KEYS[0]), 200), ({}, 401)):
        reply = studio_server.client.post(IMAGES, json={"prompt": "a"}, headers={"origin": STUDIO, **headers})
        assert reply.status_code == status, "the page may read errors too"
        assert (reply.headers["access-control-allow-origin"], reply.headers["vary"]) == (STUDIO, "Origin")
        assert "x-request-id" in reply.headers["access-control-expose-headers"]


@pytest.mark.parametrize("origin", ["https://evil.example", "http://studio.example.com", f"{STUDIO}:8443", "null", ""])
def test_other_pages_get_no_permission_and_change_nothing(studio_server: RunningServer, origin: str) -> None:
    headers = {"origin": origin, **bearer(USER_KEYS[0])}
    asked = headers | {"access-control-request-method": "POST"}
    replies = [
        studio_server.client.get("/v1/models", headers=headers),
        studio_server.client.options(IMAGES, headers=asked),
    ]
    assert [reply.status_code for reply in replies] == [200, 405]
    before = len(studio_server.engine.submitted)
    refused = [
        studio_server.client.post(IMAGES, json={"prompt": "a"}, headers=headers),
        # A form needs no permission beforehand: the browser sends it at once.
        studio_server.client.post(VIDEOS, files={"prompt": (None, "a")}, headers=headers),
        studio_server.client.delete(f"{VIDEOS}/video_{'0' * 32}", headers=headers),
    ]
    for reply in refused:
        assert error_of(reply, 403)["code"] == "origin_not_allowed"
    assert len(studio_server.engine.submitted) == before
    assert not [name for reply in (*replies, *refused) for name in reply.headers if name.startswith("access-control")]


def test_the_servers_own_pages_may_use_it(open_server: RunningServer) -> None:
    for host in (f"127.0.0.1:{open_server.port}", "images.example"):
        headers = {"host": host, "origin": f"https://{host}"}
        assert open_server.client.post(IMAGES, json={"prompt": "a"}, headers=headers).status_code == 200
