"""Reading weights in parallel, mapped and through buffers: the same bits, the same errors, no bytes too many."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.model_info import ComponentRead
from sglang.multimodal_gen.errors import CorruptCheckpoint
from sglang.multimodal_gen.runtime.distributed.parallel_state import ProcessAxis
from sglang.multimodal_gen.runtime.layers.shards import Shard
from sglang.multimodal_gen.runtime.loader import parallel_reading
from sglang.multimodal_gen.runtime.loader.component_loader import Checkpoint, explain_reads
from sglang.multimodal_gen.runtime.loader.parallel_reading import DTYPES, Reading, read_tensors, send_tensors
from sglang.multimodal_gen.runtime.loader.weight_utils import StoredTensor, open_weights, read_header

CPU = torch.device("cpu")
SMALL = Reading(num_threads=3, buffer_bytes=100)  # so that every tensor takes several, and rows do not fit evenly


def stored_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(12, 10, generator=generator),
        "half": torch.randn(12, 7, generator=generator).bfloat16(),
        "wide": torch.randn(3, 200, generator=generator).half(),
        "cube": torch.randn(4, 6, 5, generator=generator),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "counts": torch.arange(50),
        "flags": torch.arange(9) % 2 == 0,
        "eight": torch.randn(40, generator=generator).to(torch.float8_e4m3fn),
    }


@dataclass(frozen=True)
class Files:
    """Two files with these tensors in them."""

    tensors: Mapping[str, Tensor]
    places: Mapping[str, StoredTensor]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    from sglang.multimodal_gen.runtime.loader import weight_utils

    monkeypatch.setattr(weight_utils, "_READABLE_DTYPES", frozenset(DTYPES))
    tensors = stored_tensors()
    names = list(tensors)
    places: dict[str, StoredTensor] = {}
    for number, own in enumerate((names[::2], names[1::2])):
        path = tmp_path / f"part{number}.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in own}, path)
        places |= read_header(path)
    return Files(tensors, {name: places[name] for name in names})


def unchanged(_: str, tensor: Tensor) -> Tensor:
    return tensor


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        bits = (t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(*bits), name


@pytest.mark.parametrize("staged", [False, True])
def test_every_dtype_and_shape_comes_as_it_was_stored(files: Files, staged: bool) -> None:
    assert_equal(read_tensors(files.places, unchanged, device=CPU, reading=SMALL, staged=staged), files.tensors)


@pytest.mark.parametrize("staged", [False, True])
def test_a_tensor_is_converted_once_it_is_whole(files: Files, staged: bool) -> None:
    calls: list[str] = []

    def convert(name: str, tensor: Tensor) -> Tensor:
        calls.append(name)
        return tensor.double() * 2 if tensor.is_floating_point() else tensor

    found = read_tensors(files.places, convert, device=CPU, reading=SMALL, staged=staged)
    expected = {n: t.double() * 2 if t.is_floating_point() else t for n, t in files.tensors.items()}
    assert_equal(found, expected)
    assert sorted(calls) == sorted(files.tensors)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_get_what_cutting_the_whole_tensor_gives(files: Files, staged: bool, rank: int) -> None:
    axis = ProcessAxis(size=2, rank=rank)
    shards = {
        "matrix": Shard(dim=0, blocks=(8, 4), axis=axis),
        "half": Shard(dim=0, blocks=(12,), axis=axis),
        "wide": Shard(dim=1, blocks=(120, 80), axis=axis),
        "cube": Shard(dim=2 - 1, blocks=(6,), axis=axis),
    }
    found = read_tensors(files.places, unchanged, device=CPU, parts=shards, reading=SMALL, staged=staged)
    assert_equal(found, {n: shards[n].cut(t) if n in shards else t for n, t in files.tensors.items()})


def test_a_part_along_the_first_dimension_reads_its_own_bytes_alone(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    preadv = os.preadv

    def noted(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        read.append((offset, count))
        return count

    monkeypatch.setattr(parallel_reading.os, "preadv", noted)
    place = files.places["matrix"]
    shard = Shard(dim=0, blocks=(8, 4), axis=ProcessAxis(size=2, rank=1))
    read_tensors({"matrix": place}, unchanged, device=CPU, parts={"matrix": shard}, reading=SMALL, staged=True)
    touched = sorted(offset - place.offset + byte for offset, count in read for byte in range(count))
    row = 10 * 4
    assert touched == [*range(4 * row, 8 * row), *range(10 * row, 12 * row)]
    assert max(count for _, count in read) <= SMALL.buffer_bytes


def test_host_memory_is_the_buffers_however_large_the_tensors_are(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = parallel_reading._Buffer.__init__

    def noted(self: parallel_reading._Buffer, num_bytes: int, device: torch.device) -> None:
        made.append(num_bytes)
        make(self, num_bytes, device)

    monkeypatch.setattr(parallel_reading._Buffer, "__init__", noted)
    read_tensors(files.places, unchanged, device=CPU, reading=SMALL, staged=True)
    assert len(made) <= 3 * SMALL.num_threads and max(made) <= SMALL.buffer_bytes


def test_a_buffer_is_filled_again_once_what_it_held_has_arrived(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, waits, early = set[int](), list[int](), list[int]()
    fill = parallel_reading._Bytes.fill

    class Slow(parallel_reading._Buffer):
        def mark_sent(self, stream: torch.cuda.Stream | None) -> None:
            under_way.add(id(self))

        def has_arrived(self) -> bool:
            return id(self) not in under_way

        def wait(self) -> None:
            waits.append(id(self))
            under_way.remove(id(self))

    def noted(self: parallel_reading._Bytes, buffer: parallel_reading._Buffer) -> None:
        early.extend({id(buffer)} & under_way)
        fill(self, buffer)

    monkeypatch.setattr(parallel_reading, "_Buffer", Slow)
    monkeypatch.setattr(parallel_reading._Bytes, "fill", noted)
    assert_equal(read_tensors(files.places, unchanged, device=CPU, reading=SMALL, staged=True), files.tensors)
    assert waits and not early


def test_the_callers_thread_makes_and_converts_the_tensors(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    filled, sent = set[str](), set[str]()
    fill = parallel_reading._Bytes.fill

    def noted(self: parallel_reading._Bytes, buffer: parallel_reading._Buffer) -> None:
        filled.add(threading.current_thread().name)
        fill(self, buffer)

    def convert(_: str, tensor: Tensor) -> Tensor:
        sent.add(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(parallel_reading._Bytes, "fill", noted)
    read_tensors(files.places, convert, device=CPU, reading=SMALL, staged=True)
    assert sent == {threading.current_thread().name} and all(name.startswith("load") for name in filled)


def test_what_was_read_is_gone_once_it_is_converted(files: Files) -> None:
    read, left = list[weakref.ref[Tensor]](), list[str]()

    def convert(name: str, tensor: Tensor) -> Tensor:
        left.extend(name for each in read if each() is not None)
        read.append(weakref.ref(tensor))
        return tensor.double()

    read_tensors(files.places, convert, device=CPU, reading=SMALL, staged=True)
    assert len(read) == len(files.places) and not left


def test_a_mapped_tensor_is_the_file_where_nothing_changes_it(files: Files) -> None:
    found = read_tensors(files.places, unchanged, device=CPU, reading=SMALL)
    own = [n for n, place in files.places.items() if place.file == files.places["matrix"].file and found[n].numel()]
    storages = {found[n].untyped_storage().data_ptr() for n in own if files.places[n].offset % found[n].itemsize == 0}
    assert len(storages) == 1
    read_back = safetensors.torch.load_file(files.places["matrix"].file)
    found["matrix"].zero_()  # writes into a copy of its own
    assert torch.equal(safetensors.torch.load_file(files.places["matrix"].file)["matrix"], read_back["matrix"])


def test_tensors_in_host_memory_are_sent_in_parts_whatever_their_strides() -> None:
    given = {
        "plain": torch.arange(77.0).view(7, 11),
        "turned": torch.arange(60.0).view(6, 10).T,
        "cut": torch.arange(90.0).view(9, 10)[:, 2:7],
        "scalar": torch.tensor(2.0),
        "none": torch.empty(0),
    }
    found = send_tensors(given, lambda _, tensor: tensor.half(), device=CPU, reading=SMALL)
    assert_equal(found, {name: tensor.half() for name, tensor in given.items()})
    assert all(found[name].data_ptr() != tensor.data_ptr() for name, tensor in given.items() if tensor.numel())


def load_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("load")]


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_all_threads_end(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.places["matrix"].file
    monkeypatch.setattr(parallel_reading, "_check", lambda _: os.truncate(path, 300))
    with pytest.raises(CorruptCheckpoint, match=rf"{path.parent.name}/{path.name} became shorter.*truncated"):
        read_tensors(files.places, unchanged, device=CPU, reading=SMALL, staged=True)
    assert not load_threads()


@pytest.mark.parametrize("staged", [False, True])
def test_an_error_half_way_ends_all_threads_before_it_is_raised(files: Files, staged: bool) -> None:
    def refuse(name: str, tensor: Tensor) -> Tensor:
        if name == "half":
            raise CorruptCheckpoint("half way")
        return tensor

    with pytest.raises(CorruptCheckpoint, match="half way"):
        read_tensors(files.places, refuse, device=CPU, reading=SMALL, staged=staged)
    assert not load_threads()


@pytest.mark.parametrize("staged", [False, True])
def test_after_an_error_nothing_more_is_read(files: Files, staged: bool) -> None:
    places, converted = {str(number): files.places["matrix"] for number in range(500)}, list[str]()

    def refuse(name: str, tensor: Tensor) -> Tensor:
        converted.append(name)
        if name == "0":
            raise CorruptCheckpoint("the first")
        time.sleep(0.001)  # so that the thread of the first one has its turn
        return tensor

    with pytest.raises(CorruptCheckpoint, match="the first"):
        read_tensors(places, refuse, device=CPU, reading=SMALL, staged=staged)
    assert len(converted) < 400


def test_a_file_with_a_gap_is_refused_as_the_library_refuses_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    data = path.read_bytes().replace(b'"data_offsets":[0,16]', b'"data_offsets":[0,12]')
    path.write_bytes(data)
    stored = open_weights(tmp_path)
    with pytest.raises(CorruptCheckpoint, match="is not a valid safetensors file"):
        stored.load(["a", "b"], unchanged)


def test_a_file_that_is_gone_is_an_error_of_the_checkpoint(files: Files) -> None:
    files.places["half"].file.unlink()
    with pytest.raises(CorruptCheckpoint, match=r"cannot be read \(.*No such file"):
        read_tensors(files.places, unchanged, device=CPU, staged=True)


def test_reading_a_component_says_how_much_and_how_fast(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(8, 4), "bias": torch.ones(8)}, tmp_path / "model.safetensors")
    source = Checkpoint()
    with torch.device("meta"):
        module = nn.Linear(4, 8)
    tensors = source.tensors_for(tmp_path, module, dtype_of=lambda _: torch.bfloat16, device=CPU)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    [read] = source.reads
    assert (read.component, read.num_bytes) == (tmp_path.name, 4 * 40) and read.seconds > 0
    told = ComponentRead(component="vae", num_bytes=3_000_000_000, seconds=1.5)
    assert list(explain_reads([told])) == ["vae: 3.00 GB read in 1.50 s, 2.0 GB/s"]
