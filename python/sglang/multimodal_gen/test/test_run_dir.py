"""Arrays travel as files that exist exactly until they are mapped; a dead server's directory is swept."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sglang.multimodal_gen.errors import InsufficientStorage, StorageError
from sglang.multimodal_gen.runtime.managers import run_dir as module
from sglang.multimodal_gen.runtime.managers.messages import MappedArray
from sglang.multimodal_gen.runtime.managers.run_dir import OwnedRunDir, RunDir


@pytest.fixture
def owned() -> Iterator[OwnedRunDir]:
    with contextlib.closing(OwnedRunDir()) as directory:
        yield directory


def files(paths: RunDir) -> list[str]:
    return [p.name for d in (paths.base, paths.fast) if d is not None for p in d.glob("m-*")]


@pytest.mark.parametrize("array", [np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.ones((3, 0), np.float32),
                                   np.linspace(0, 1, 7, dtype=np.float32)[::2]])  # fmt: skip
def test_an_array_arrives_as_it_was_and_its_file_is_gone(owned: OwnedRunDir, array: np.ndarray) -> None:
    ref = owned.paths.put(array)
    assert files(owned.paths) == [ref.file]
    taken = RunDir.at(str(owned.paths.base)).take(ref)
    assert files(owned.paths) == []
    np.testing.assert_array_equal(taken, array)
    assert taken.dtype == array.dtype


def test_an_allocated_array_is_filled_in_place(owned: OwnedRunDir) -> None:
    ref, view = owned.paths.allocate((2, 3), "|u1")
    view[:] = 7
    assert owned.paths.take(ref).tolist() == [[7, 7, 7], [7, 7, 7]]


def test_without_room_in_shared_memory_the_temp_directory_serves(owned: OwnedRunDir, tmp_path: Path) -> None:
    slow = RunDir(owned.paths.base, None)
    ref = slow.put(np.arange(3))
    assert (owned.paths.base / ref.file).exists()
    assert slow.take(ref).tolist() == [0, 1, 2]


def test_more_than_there_is_room_for_is_a_clear_error_and_leaves_nothing(owned: OwnedRunDir) -> None:
    with pytest.raises(InsufficientStorage, match="no room"):
        owned.paths.allocate((1 << 50,), "|u1")
    assert files(owned.paths) == []


@pytest.mark.parametrize("file", ["../../etc/passwd", "m-/../x", "lock"])
def test_only_files_of_the_run_directory_are_mapped(owned: OwnedRunDir, file: str) -> None:
    with pytest.raises(StorageError, match="outside the run directory"):
        owned.paths.take(MappedArray(file=file, shape=(1,), dtype="|u1"))


def test_a_file_cut_short_is_refused(owned: OwnedRunDir) -> None:
    ref = owned.paths.put(np.zeros(8, np.uint8))
    path = next(d / ref.file for d in (owned.paths.fast, owned.paths.base) if d is not None and (d / ref.file).exists())
    os.truncate(path, 4)
    with pytest.raises(StorageError, match="cut short"):
        owned.paths.take(ref)


def test_the_directory_is_private_and_goes_with_its_owner() -> None:
    directory = OwnedRunDir()
    paths = [p for p in (directory.paths.base, directory.paths.fast) if p is not None]
    assert all(p.stat().st_mode & 0o777 == 0o700 for p in paths)
    directory.close()
    assert not any(p.exists() for p in paths)


def test_the_next_server_sweeps_what_a_killed_one_left_and_spares_the_living(
    owned: OwnedRunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, signal, numpy; from sglang.multimodal_gen.runtime.managers.run_dir import OwnedRunDir\n"
        "d = OwnedRunDir(); d.paths.put(numpy.zeros(9)); print(d.paths.base, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    left = RunDir.at(done.stdout.strip())
    assert left.base.is_dir()
    old = time.time() - 60
    os.utime(left.base, (old, old))
    os.utime(owned.paths.base, (old, old))
    module.sweep()
    assert not left.base.exists()
    assert left.fast is None or not left.fast.exists()
    assert owned.paths.base.is_dir()


def test_a_server_with_another_temp_directory_leaves_this_one_its_memory(
    owned: OwnedRunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert owned.paths.fast is not None, "this machine has shared memory"
    os.utime(owned.paths.fast, (1, 1))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module.sweep()
    assert owned.paths.fast.is_dir()
