"""The object store against a real S3 server: uploads, ranges, URLs, retries, and what is said when it is no use."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.errors import (
    InvalidValue,
    MissingPackage,
    MissingParameter,
    StorageError,
    StorageUnavailable,
)
from sglang.multimodal_gen.runtime.postprocess import object_store
from sglang.multimodal_gen.runtime.postprocess.object_store import ObjectStore
from sglang.multimodal_gen.test.s3_server import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    Proxy,
    S3Server,
    proxy_to,
    s3_server,
    store_variables,
)

CONTENT = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[S3Server, Proxy]]:
    with s3_server() as server, proxy_to(server) as proxy:
        yield server, proxy


@pytest.fixture
def server(running: tuple[S3Server, Proxy]) -> S3Server:
    running[0].clear()
    return running[0]


@pytest.fixture
def proxy(running: tuple[S3Server, Proxy], server: S3Server) -> Iterator[Proxy]:
    yield running[1]
    running[1].reset()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip"
    path.write_bytes(CONTENT)
    return path


def store_at(url: str, **changed: str) -> ObjectStore:
    settings = envs.store_settings(store_variables(url, **changed))
    assert settings is not None
    return ObjectStore(settings)


async def whole(store: ObjectStore, name: str, begin: int, end: int, *, etag: str | None = None) -> bytes:
    return b"".join([piece async for piece in store.read(name, begin, end, etag=etag)])


@pytest.mark.parametrize("name", ["clip.mp4", "a b#%.png", "ünï~[x]*?.thumb.webp", "A+B&c=d.JPG"])
def test_an_uploaded_file_is_there_under_its_name_until_it_is_removed(server: S3Server, clip: Path, name: str) -> None:
    store = store_at(server.url, key_prefix="some/place/")
    assert not store.has(name)
    stored = store.put(name, clip)
    assert stored.key == f"some/place/{name}" and server.contents() == [stored.key] and store.has(name)
    found = server.client.get_object(Bucket=BUCKET, Key=stored.key)
    assert found["Body"].read() == CONTENT and stored.num_bytes == len(CONTENT)
    assert found["ContentType"] == {"4": "video/mp4", "g": "image/png", "p": "image/webp", "G": "image/jpeg"}[name[-1]]
    store.remove([stored.key, "some/place/never-there"])
    assert server.contents() == [] and not store.has(name)


def test_a_presigned_url_needs_no_credentials_and_expires(server: S3Server, clip: Path) -> None:
    url = store_at(server.url, url_lifetime="90").put("clip.mp4", clip).url
    assert urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)["X-Amz-Expires"] == ["90"]
    with urllib.request.urlopen(url) as reply:
        assert (reply.read(), reply.headers["content-type"]) == (CONTENT, "video/mp4")


def test_bytes_are_read_in_pieces_of_one_version(server: S3Server, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_PIECE_BYTES", 1000)
    store = store_at(server.url)
    store.put("clip.mp4", clip)
    facts = asyncio.run(store.facts("clip.mp4"))
    assert facts.size == len(CONTENT)
    assert asyncio.run(whole(store, "clip.mp4", 5, 3500, etag=facts.etag)) == CONTENT[5:3500]
    clip.write_bytes(CONTENT[::-1])
    store.put("clip.mp4", clip)
    with pytest.raises(StorageUnavailable):
        asyncio.run(whole(store, "clip.mp4", 0, 10, etag=facts.etag))
    with pytest.raises(FileNotFoundError):
        asyncio.run(store.facts("clip.webm"))


def test_a_large_file_goes_up_in_parts(server: S3Server, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_ONE_REQUEST_BYTES", 6 << 20)
    monkeypatch.setattr(object_store, "_PART_BYTES", 5 << 20)  # S3 takes none that are smaller
    content = CONTENT * 1100
    clip.write_bytes(content)
    key = store_at(server.url).put("clip.mp4", clip).key
    found = server.client.get_object(Bucket=BUCKET, Key=key)
    assert found["ETag"].strip('"').endswith("-3"), "three parts"
    assert found["ContentType"] == "video/mp4" and found["Body"].read() == content
    assert server.num_unfinished_uploads() == 0


def test_an_upload_is_tried_again_when_the_store_is_busy(server: S3Server, proxy: Proxy, clip: Path) -> None:
    proxy.faults.failures = 3
    store_at(proxy.url).put("clip.mp4", clip)
    assert (proxy.faults.attempts, server.contents()) == (4, ["clip.mp4"])


def test_an_upload_is_not_tried_for_ever(
    server: S3Server, proxy: Proxy, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_MAX_RETRIES", 2)
    proxy.faults.failures = 1000
    with pytest.raises(StorageError, match=r"^the object store did not take the result: SlowDown$"):
        store_at(proxy.url).put("clip.mp4", clip)
    assert (proxy.faults.attempts, server.contents()) == (3, [])


def test_a_removal_that_fails_says_so(server: S3Server, proxy: Proxy, clip: Path) -> None:
    key = store_at(server.url).put("clip.mp4", clip).key
    proxy.faults.method, proxy.faults.failures = "DELETE", 1000
    with pytest.raises(StorageUnavailable, match=r"did not remove a result"):
        store_at(proxy.url, upload_timeout="1").remove([key])
    assert server.contents() == [key]


def test_a_session_token_of_other_credentials_is_left_alone(
    server: S3Server, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-another-key")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ANOTHERKEY")
    url = store_at(server.url).put("clip.mp4", clip).url
    assert "Security-Token" not in url and ACCESS_KEY in url


def test_credentials_of_the_environment_serve_where_none_are_given(
    server: S3Server, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEYOFTHEMACHINE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    store = store_at(server.url, access_key_id="", secret_access_key="")
    assert "KEYOFTHEMACHINE" in store.put("clip.mp4", clip).url


def test_a_usable_bucket_passes_the_check_and_is_as_it_was(server: S3Server) -> None:
    store_at(server.url, key_prefix="p").check()
    assert server.contents() == []


def test_a_missing_bucket_is_named_with_its_variable(server: S3Server) -> None:
    with pytest.raises(InvalidValue, match=r"^SGLANG_S3_BUCKET_NAME: got no-such-bucket, accepted is the name of a"):
        store_at(server.url, bucket_name="no-such-bucket").check()


def test_a_bucket_that_goes_away_is_no_missing_object(server: S3Server, clip: Path) -> None:
    store = store_at(server.url, bucket_name="no-such-bucket")
    with pytest.raises(StorageError, match=r"did not take the result: NoSuchBucket$"):
        store.put("clip.mp4", clip)


def test_a_store_that_does_not_answer_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_MAX_RETRIES", 1)
    with pytest.raises(StorageError, match=r"^SGLANG_S3_ENDPOINT_URL: .* at http://127\.0\.0\.1:9 \(no answer\)$"):
        store_at("http://127.0.0.1:9").check()


def test_keys_that_the_store_does_not_know_or_that_may_not_write_are_refused(clip: Path) -> None:
    """A server of its own: once it asks for keys it does so for good."""
    with s3_server() as server:
        good = user_of(server, "good", actions="s3:*")
        reader = user_of(server, "reader", actions="s3:GetObject")
        asks = urllib.request.Request(f"{server.url}/moto-api/reset-auth", data=b"0", method="POST")
        asks.add_header("content-type", "text/plain")
        urllib.request.urlopen(asks).close()
        store_at(server.url, **good).check()
        for keys, answer in (
            ({}, "InvalidAccessKeyId"),
            ({**good, "secret_access_key": "wrong-secret"}, "SignatureDoesNotMatch"),
            (reader, "AccessDenied"),
        ):
            with pytest.raises(StorageError) as raised:
                store_at(server.url, **keys).check()
            message = str(raised.value)
            assert message.startswith("SGLANG_S3_ACCESS_KEY_ID and SGLANG_S3_SECRET_ACCESS_KEY: ")
            assert message.endswith(f"({answer})")
            assert not any(secret in message for secret in (ACCESS_KEY, SECRET_KEY, *keys.values()))
            with pytest.raises(StorageError, match=f": {answer}$"):
                store_at(server.url, **keys).put("clip.mp4", clip)


def user_of(server: S3Server, name: str, *, actions: str) -> dict[str, str]:
    """The keys of a new user who may do `actions`."""
    iam = boto3.client(
        "iam",
        endpoint_url=server.url,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
    )
    iam.create_user(UserName=name)
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
    iam.put_user_policy(UserName=name, PolicyName="only", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    iam.close()
    return {"access_key_id": key["AccessKeyId"], "secret_access_key": key["SecretAccessKey"]}


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingPackage, match=r'^SGLANG_CLOUD_STORAGE_TYPE: .*"sglang-diffusion\[s3\]"$'):
        store_at("http://127.0.0.1:9")


def test_without_a_type_nothing_is_uploaded_and_variables_that_have_no_effect_are_told() -> None:
    variables = store_variables("http://127.0.0.1:9")
    del variables["SGLANG_CLOUD_STORAGE_TYPE"]
    assert envs.store_settings(variables) is None
    [sentence] = envs.unknown_variables(variables, [])
    assert "SGLANG_S3_SECRET_ACCESS_KEY: no effect, since SGLANG_CLOUD_STORAGE_TYPE is not set to s3" in sentence
    assert SECRET_KEY not in sentence
    typo = {**store_variables("http://127.0.0.1:9"), "SGLANG_S3_BUCKET": "x"}
    assert envs.unknown_variables(typo, []) == (
        "the environment variable SGLANG_S3_BUCKET is not known and has no effect; did you mean SGLANG_S3_BUCKET_NAME?",
    )


def test_settings_have_defaults_and_hide_their_secrets() -> None:
    settings = envs.store_settings({"SGLANG_CLOUD_STORAGE_TYPE": "S3", "SGLANG_S3_BUCKET_NAME": "b"})
    assert settings is not None
    assert dataclasses.astuple(settings) == ("b", "", None, "us-east-1", None, 60, 3600)
    shown = repr(envs.store_settings(store_variables("https://store.example/")))
    assert "endpoint_url='https://store.example'" in shown
    assert ACCESS_KEY not in shown and SECRET_KEY not in shown


@pytest.mark.parametrize(
    ("changed", "kind", "named"),
    [
        ({"bucket_name": ""}, MissingParameter, "SGLANG_S3_BUCKET_NAME"),
        ({"secret_access_key": ""}, MissingParameter, "SGLANG_S3_SECRET_ACCESS_KEY"),
        ({"access_key_id": ""}, MissingParameter, "SGLANG_S3_ACCESS_KEY_ID"),
        ({"endpoint_url": "store.example"}, InvalidValue, "SGLANG_S3_ENDPOINT_URL"),
        ({"endpoint_url": "https://me:hidden@store.example"}, InvalidValue, "SGLANG_S3_ENDPOINT_URL"),
        ({"key_prefix": "a//b"}, InvalidValue, "SGLANG_S3_KEY_PREFIX"),
        ({"key_prefix": "../b"}, InvalidValue, "SGLANG_S3_KEY_PREFIX"),
        ({"upload_timeout": "0"}, InvalidValue, "SGLANG_S3_UPLOAD_TIMEOUT"),
        ({"url_lifetime": "604801"}, InvalidValue, "SGLANG_S3_URL_LIFETIME"),
        ({"url_lifetime": "1h"}, InvalidValue, "SGLANG_S3_URL_LIFETIME"),
    ],
)
def test_a_variable_that_cannot_be_accepted_is_named(changed: dict[str, str], kind: type, named: str) -> None:
    with pytest.raises(kind, match=f"^{named}: ") as raised:
        envs.store_settings(store_variables("http://127.0.0.1:9", **changed))
    assert "hidden" not in str(raised.value) and SECRET_KEY not in str(raised.value)


def test_other_kinds_of_stores_are_refused() -> None:
    with pytest.raises(InvalidValue, match=r"^SGLANG_CLOUD_STORAGE_TYPE: got gcs, accepted is s3$"):
        envs.store_settings({"SGLANG_CLOUD_STORAGE_TYPE": "gcs"})
