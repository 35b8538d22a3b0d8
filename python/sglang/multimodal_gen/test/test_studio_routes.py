"""How the Studio's files are served. What the page does is shown in a browser, in test/test_studio.py."""

from __future__ import annotations

import re

import pytest

from sglang.multimodal_gen.runtime.entrypoints.studio_routes import STUDIO_DIRECTORY
from sglang.multimodal_gen.runtime.server_args import HttpArgs, resolve_server_args
from sglang.multimodal_gen.test.scripted_server import RunningServer, Start

FILES = sorted(path.name for path in STUDIO_DIRECTORY.iterdir())
PAGE = "/studio"


@pytest.fixture(scope="module")
def server(start_server: Start) -> RunningServer:
    return start_server()


@pytest.mark.parametrize("name", FILES)
def test_each_file_has_its_type_a_strict_policy_and_an_etag(server: RunningServer, name: str) -> None:
    reply = server.client.get(f"{PAGE}/{name}")
    expected = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert reply.headers["content-type"] == f"{expected[name.rpartition('.')[2]]}; charset=utf-8"
    assert reply.content == (STUDIO_DIRECTORY / name).read_bytes()
    assert reply.headers["x-content-type-options"] == "nosniff"
    policy = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and policy["script-src"] == "'self'"
    assert "unsafe" not in reply.headers["content-security-policy"]
    again = server.client.get(f"{PAGE}/{name}", headers={"if-none-match": f'W/{reply.headers["etag"]}, "other"'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", reply.headers["etag"])
    assert server.client.get(f"{PAGE}/{name}", headers={"if-none-match": '"other"'}).status_code == 200
    head = server.client.head(f"{PAGE}/{name}")
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(reply.content)))


def test_the_page_names_only_files_that_are_there_and_nothing_elsewhere(server: RunningServer) -> None:
    page = server.client.get(PAGE)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == (STUDIO_DIRECTORY / "index.html").read_bytes()
    named = re.findall(r'(?:src|href)="([^"#][^"]*)"', page.text)
    assert named and all(name.removeprefix("studio/") in FILES for name in named)
    for path in STUDIO_DIRECTORY.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        imported = re.findall(r'from "([^"]+)"', text)
        assert all(name.removeprefix("./") in FILES for name in imported), path.name
        assert not re.search(r"\binnerHTML\b|\beval\(|document\.write", text), path.name
    texts = [path.read_text(encoding="utf-8") for path in STUDIO_DIRECTORY.iterdir()]
    assert {found for text in texts for found in re.findall(r"https?://[^\"\s]+", text)} == {
        "http://www.w3.org/2000/svg"
    }


def test_the_root_leads_to_the_page_and_neither_is_in_the_openapi_document(server: RunningServer) -> None:
    reply = server.client.get("/")
    assert (reply.status_code, reply.headers["location"]) == (307, "studio")
    assert server.client.get(f"{PAGE}/", follow_redirects=True).url.path == PAGE
    paths = server.client.get("/openapi.json").json()["paths"]
    assert paths and not [path for path in paths if path == "/" or "studio" in path]


@pytest.mark.parametrize("name", ["missing.js", "..%2Fstudio_routes.py", "%2e%2e/http_server.py", "main.js/x"])
def test_there_is_nothing_but_the_files(server: RunningServer, name: str) -> None:
    reply = server.client.get(f"{PAGE}/{name}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


def test_the_studio_can_be_switched_off(start_server: Start) -> None:
    assert HttpArgs().studio and not resolve_server_args({"studio": False}, environ={}).args.http.studio
    without = start_server(studio=False)
    for path in ("/", PAGE, f"{PAGE}/main.js"):
        assert without.client.get(path).status_code == 404
    assert without.client.get("/liveness").status_code == 200


def test_schemas_tell_the_group_of_a_field_and_who_takes_it(server: RunningServer) -> None:
    """What the form is made of besides types, bounds and defaults."""
    page = server.client.get("/openapi.json").json()
    fields = page["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert (fields["fps"]["x-group"], fields["fps"]["x-unset"]) == ("size", "the model's own")
    assert fields["boundary_ratio"]["x-of-some-models"] is True and "x-of-some-models" not in fields["fps"]
    assert fields["profile"]["x-admin"] is True and "x-admin" not in fields["fps"]
