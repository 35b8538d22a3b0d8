"""The documentation builds without warnings, and its examples run as they are printed."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from server_process import ServerProcess
from sglang.multimodal_gen.errors import ServingError
from sglang.multimodal_gen.runtime.entrypoints.cli import bench, generate, plan, quantize, serve
from snippets import REPOSITORY, Snippet, all_snippets, command_lines, sessions, snippets_of

SNIPPETS = all_snippets()
SESSIONS = sessions(SNIPPETS)
RUNNING = {name: blocks for name, blocks in SESSIONS.items() if any(block.what == "run" for block in blocks)}
CHECKED = [snippet for snippet in SNIPPETS if snippet.what == "check"]
ON_SERVER = [snippet for snippet in SNIPPETS if snippet.what == "server"]
COMMANDS = {"generate": generate, "serve": serve, "bench": bench, "plan": plan, "quantize": quantize}


def identity(snippet: Snippet) -> str:
    return snippet.where


def environment() -> dict[str, str]:
    """This process's, with the commands of its Python first and no option set by a variable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_DIFFUSION_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command: list[str], text: str, directory: Path) -> str:
    """What the program prints; it must end well."""
    done = subprocess.run(
        command, input=text, cwd=directory, env=environment(), text=True, timeout=110, capture_output=True, check=False
    )
    assert done.returncode == 0, f"{text}\n--- printed\n{done.stdout}\n--- said\n{done.stderr}"
    return done.stdout


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.findall("^WARNING.*", done.stderr, re.MULTILINE)
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert len(pages) >= 15
    loaded = {
        url for page in pages for url in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)', page)
    }
    assert not loaded, "a reader without a network sees the same pages"


def test_every_block_says_whether_it_runs() -> None:
    assert [snippet.where for snippet in SNIPPETS if snippet.what is None] == []
    assert len(RUNNING) >= 5 and len(ON_SERVER) >= 2


@pytest.mark.parametrize("name", RUNNING)
def test_a_session_runs_as_printed(name: str, tmp_path: Path) -> None:
    """Files first, then each block of bash; the blocks of Python form one program, as in one REPL."""
    blocks = RUNNING[name]
    write_files(blocks, tmp_path)
    for block in blocks:
        if block.what == "run" and block.language == "bash":
            run(["bash", "-euo", "pipefail", "-s"], block.text, tmp_path)
    program = "\n".join(block.text for block in blocks if block.what == "run" and block.language == "python")
    if program:
        printed = run([sys.executable, "-"], program, tmp_path)
        assert said_of(name) <= set(printed.splitlines())


def write_files(blocks: list[Snippet], directory: Path) -> None:
    for block in blocks:
        if block.what == "file":
            (directory / block.file).write_text(block.text, encoding="utf-8")


def said_of(session: str) -> set[str]:
    """The lines that a page says its program prints."""
    if session != "family":
        return set()
    page = (REPOSITORY / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    said = set(re.findall(r"`(\w+ \[\d+, \d+, \d+\])`", page))
    assert len(said) == 2
    return said


@pytest.mark.parametrize("snippet", ON_SERVER, ids=identity)
def test_a_client_of_the_server_runs_as_printed(snippet: Snippet, server: ServerProcess, tmp_path: Path) -> None:
    """Only the port is another one, since the default one may be taken."""
    assert "localhost:30000" in snippet.text
    text = snippet.text.replace("localhost:30000", urllib.parse.urlsplit(server.url).netloc)
    command = ["bash", "-euo", "pipefail", "-s"] if snippet.language == "bash" else [sys.executable, "-"]
    try:
        run(command, text, tmp_path)
    finally:
        with httpx.Client(base_url=f"{server.url}/v1", timeout=30) as api:  # what it left running must not slow others
            for video in api.get("/videos").json()["data"]:
                api.delete(f"/videos/{video['id']}")


# --- blocks that are not run ---


@pytest.mark.parametrize("snippet", CHECKED, ids=identity)
def test_a_block_that_is_not_run_is_at_least_right(
    snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(SESSIONS[snippet.session or snippet.where], tmp_path)
    monkeypatch.chdir(tmp_path if snippet.session else REPOSITORY)
    check_block(snippet)


def check_block(snippet: Snippet) -> None:
    if snippet.language == "bash":
        for line in command_lines(snippet.text):
            check_command(shlex.split(line, comments=True))
    elif snippet.language == "python":
        imports = [node for node in ast.parse(snippet.text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), snippet.where, "exec"), {})
    else:
        generate.parser().typed([f"--{name}={value}" for name, value in yaml.safe_load(snippet.text).items()])


def check_command(words: list[str]) -> None:
    """Raises ServingError or AssertionError when the command line is wrong."""
    while re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    name = words[0].rpartition("/")[2]
    if "/" in words[0]:
        assert os.access(REPOSITORY / words[0], os.X_OK), words[0]
    if name in ("sglang", "docker"):
        CHECKS[name](words)
    elif name == "pip" or words[1:3] == ["-m", "pip"]:
        check_pip(words[words.index("pip") :])
    elif name in ("python", "python3", "torchrun"):
        (script, *_) = [word for word in words if word.endswith(".py")]
        assert (REPOSITORY / script).is_file(), script
    else:
        assert "/" in words[0], f"nobody knows how to check {name}"


def check_sglang(words: list[str]) -> None:
    """The real options read the line; nothing starts."""
    if words[1:] != ["version"]:
        assert words[1] in COMMANDS, words
        COMMANDS[words[1]].configure(words[2:])


def check_docker(words: list[str]) -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    if words[1] == "build":
        target = words[words.index("--target") + 1]
        assert f"AS {target}\n" in dockerfile
        return
    assert words[1] == "run" and any(word.startswith("--shm-size=") for word in words)
    image = next(place for place, word in enumerate(words) if word.startswith("sglang-diffusion:"))
    assert f"AS {words[image].partition(':')[2]}\n" in dockerfile
    if words[image + 1 :]:
        check_sglang(["sglang", *words[image + 1 :]])


def check_pip(words: list[str]) -> None:
    assert words[1] == "install"
    if words[-1].endswith(".whl"):
        return
    path, _, extras = words[-1].rstrip("]").partition("[")
    project = (REPOSITORY / path / "pyproject.toml").read_text(encoding="utf-8")
    for extra in extras.split(","):
        assert f"\n{extra} = [" in project, extra


CHECKS: dict[str, Callable[[list[str]], None]] = {"sglang": check_sglang, "docker": check_docker}


# --- the checks themselves ---


@pytest.mark.parametrize(
    "text",
    [
        "sglang generate --promt x",
        "sglang serve --port 1e9",
        "sglang serve --config no/such.yaml",
        "sglang sing",
        "scripts/no-such --prompt x",
        "python scripts/no_such.py",
        'pip install -e "python[no-such]"',
        "docker build --target no-such -t x .",
        "docker run -p 1:1 sglang-diffusion:cpu",
        "docker run --shm-size=1g sglang-diffusion:cpu serve --prot 1",
        "frobnicate",
    ],
)
def test_a_wrong_command_line_is_found(text: str) -> None:
    block = Snippet("page:1", "bash", f"# a comment\n{text}\n", "check")
    with pytest.raises((ServingError, AssertionError)):
        check_block(block)


def test_a_wrong_import_and_a_wrong_option_of_a_file_are_found() -> None:
    with pytest.raises(ImportError):
        check_block(Snippet("page:1", "python", "from sglang.multimodal_gen import nothing\n", "check"))
    with pytest.raises(ServingError):
        check_block(Snippet("page:1", "yaml", "widht: 64\n", "check"))


def test_marks_and_sessions_are_read() -> None:
    page = (
        "<!-- snippet: file=a.py session=s -->\n```python title='x'\na = 1\n```\n"
        "text\n```text\nleft alone\n```\n<!-- snippet: run session=s -->\n```bash\nls\n```\n```yaml\na: 1\n```\n"
    )
    found = list(snippets_of(page, page="p.md"))
    assert [(s.where, s.what, s.file, s.session, s.text) for s in found] == [
        ("p.md:2", "file", "a.py", "s", "a = 1\n"),
        ("p.md:10", "run", "", "s", "ls\n"),
        ("p.md:13", None, "", "", "a: 1\n"),
    ]
    assert {name: len(blocks) for name, blocks in sessions(found).items()} == {"s": 2, "p.md:13": 1}
    assert command_lines("# no\na \\\n    b\n\nc\n") == ["a b", "c"]
