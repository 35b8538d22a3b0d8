"""A wheel holds all that a user needs: installed into an empty environment, it generates from an empty directory."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

PYTHON_DIRECTORY = Path(__file__).parents[1] / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(command, cwd=PYTHON_DIRECTORY, check=True, capture_output=True, timeout=120)
    (path,) = target.glob("*.whl")
    return path


def test_the_wheel_holds_the_embedded_model_the_studio_and_the_licence_but_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "sglang/multimodal_gen/assets/demo_model/model_index.json" in names
    assert "sglang/multimodal_gen/assets/demo_model/transformer/diffusion_pytorch_model.safetensors" in names
    studio = PYTHON_DIRECTORY / "sglang/multimodal_gen/runtime/entrypoints/studio"
    files = {str(path.relative_to(PYTHON_DIRECTORY)) for path in studio.iterdir()}
    assert any(name.endswith("index.html") for name in files) and files <= set(names)
    assert not [name for name in names if "/test/" in name]


@pytest.mark.timeout(180)
def test_the_wheel_installs_into_an_empty_environment_and_generates_from_an_empty_directory(
    wheel: Path, tmp_path: Path
) -> None:
    """The dependencies are lent by this environment, so that nothing is downloaded; the package itself is not."""
    home, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True, timeout=120)
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                          capture_output=True, text=True).stdout.strip()  # fmt: skip
    # A path line adds the directory without reading its .pth files, so the editable install there stays unseen.
    Path(site, "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run(
        [home / "bin" / "sglang", "generate", "--prompt", "a red circle moving right", "--num-inference-steps", "2",
         "--seed", "1", "--output-path", "out"],
        cwd=empty, capture_output=True, text=True, timeout=150, env={"HOME": str(empty), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((empty / "out").glob("*.mp4"))) == 1
