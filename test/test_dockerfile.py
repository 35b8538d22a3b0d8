"""The Dockerfile against the project: no image is built here, but what it names exists and its health check works."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.parse
from pathlib import Path

import pytest

from server_process import ServerProcess
from sglang.multimodal_gen import envs
from sglang.multimodal_gen.runtime.server_args import HttpArgs, server_options

REPOSITORY = Path(__file__).parents[1]
TARGETS = ("cpu", "cuda")


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, without comments."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def stages(instructions: list[tuple[str, str]]) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """(what it starts from, its instructions) by name of the stage."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for name, rest in instructions:
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            current = found[stage] = (base, [])
        elif found:
            current[1].append((name, rest))
    return found


def effective(instructions: list[tuple[str, str]], target: str) -> list[tuple[str, str]]:
    """All instructions that make `target`, from its first stage on."""
    base, own = stages(instructions)[target]
    return (effective(instructions, base) if base in stages(instructions) else []) + own


def test_both_targets_exist_and_end_as_a_user_without_rights(instructions: list[tuple[str, str]]) -> None:
    for target in TARGETS:
        users = [rest for name, rest in effective(instructions, target) if name == "USER"]
        assert users == ["sglang"]
        assert any("useradd" in rest and "sglang" in rest for _, rest in effective(instructions, target))


def test_python_is_one_that_the_package_accepts(instructions: list[tuple[str, str]]) -> None:
    (version,) = [rest.partition("=")[2] for name, rest in instructions if rest.startswith("PYTHON_VERSION=")]
    wanted = pyproject()["project"]["requires-python"]
    assert wanted == f">={version}"


def pyproject() -> dict:
    return tomllib.loads((REPOSITORY / "python" / "pyproject.toml").read_text(encoding="utf-8"))


def test_what_is_copied_exists_and_is_not_ignored(instructions: list[tuple[str, str]]) -> None:
    copied = [rest.split()[:-1] for name, rest in instructions if name in ("COPY", "ADD")]
    assert copied
    ignored = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for source in [source for sources in copied for source in sources]:
        assert (REPOSITORY / source).exists(), source
        decisions = [line for line in ignored if fnmatch.fnmatch(source, line.removeprefix("!"))]
        assert decisions and decisions[-1].startswith("!"), f"{source} is ignored"
    assert "python/sglang/multimodal_gen/test" in ignored


def test_every_target_installs_the_wheel_with_an_extra_that_exists(instructions: list[tuple[str, str]]) -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    for target in TARGETS:
        installs = [rest for name, rest in effective(instructions, target) if name == "RUN" and "pip install" in rest]
        (wanted,) = [match[1] for rest in installs if (match := re.search(r"\.whl\)\[([\w,]+)\]", rest))]
        assert wanted == "diffusion,s3" and set(wanted.split(",")) <= extras.keys()
        assert all("from=wheel" in rest for rest in installs)


def test_variables_are_options_of_the_server(instructions: list[tuple[str, str]]) -> None:
    for target in TARGETS:
        pairs = [pair for name, rest in effective(instructions, target) if name == "ENV" for pair in rest.split()]
        environ = dict(pair.split("=", 1) for pair in pairs)
        assert envs.unknown_variables(environ, server_options()) == ()
        assert environ["SGLANG_DIFFUSION_DEVICE"] == target
        assert environ["SGLANG_DIFFUSION_HOST"] == "0.0.0.0"


def test_the_container_serves_on_the_port_that_it_exposes(instructions: list[tuple[str, str]]) -> None:
    for target in TARGETS:
        said = dict(effective(instructions, target))
        assert int(said["EXPOSE"]) == HttpArgs().port
        assert (json.loads(said["ENTRYPOINT"]), json.loads(said["CMD"])) == (["sglang"], ["serve"])


def test_the_health_check_tells_a_ready_server_from_none(
    instructions: list[tuple[str, str]], server: ServerProcess
) -> None:
    (rest,) = [rest for name, rest in instructions if name == "HEALTHCHECK"]
    command = json.loads(rest.partition("CMD")[2])
    assert command[0] == "python"
    port = str(urllib.parse.urlsplit(server.url).port)

    def exit_status(**environment: str) -> int:
        run = [sys.executable, *command[1:]]
        done = subprocess.run(run, env=os.environ | environment, timeout=30, capture_output=True, check=False)
        return done.returncode

    assert exit_status(SGLANG_DIFFUSION_PORT=port) == 0
    assert exit_status(SGLANG_DIFFUSION_PORT="1") != 0
    assert f"'{HttpArgs().port}'" in command[-1], "without the variable the server's default port is asked"


def test_the_size_of_shared_memory_is_documented_where_it_is_needed() -> None:
    """A request holds its decoded frames at most twice: on the way to the output process, and on the way back."""
    for file in ("Dockerfile", "docs/deployment.md"):
        text = (REPOSITORY / file).read_text(encoding="utf-8")
        assert "--shm-size" in text
        assert re.search(r"2 \* frames \* height \* width \* 3", text), file
        mebibytes = round(2 * 81 * 480 * 832 * 3 / 2**20)
        assert re.search(rf"\b{mebibytes}\b", text), f"{file}: 81 frames of 832x480 are {mebibytes} MiB"
