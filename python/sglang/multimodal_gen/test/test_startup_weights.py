"""What `bench startup` says of reading weights, and the checkpoints that it is measured with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch

from sglang.multimodal_gen.configs.model_info import ComponentRead
from sglang.multimodal_gen.runtime.bench import report
from sglang.multimodal_gen.runtime.bench.page_cache import PageCacheRate, page_cache_rate, weight_files
from sglang.multimodal_gen.runtime.bench.startup import Started, summarise_runs, with_reads
from sglang.multimodal_gen.runtime.bench.startup_timeline import Timeline
from sglang.multimodal_gen.runtime.bench.tables import as_text
from sglang.multimodal_gen.runtime.loader.weight_utils import open_weights

REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    path = REPOSITORY / "scripts" / "write_checkpoint.py"
    spec = importlib.util.spec_from_file_location("write_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def started(reading: float) -> Started:
    moments = (("importing torch", 2.0), ("loading vae", 2.5), ("loading transformer", 6.5), ("ready", 7.0))
    read = ComponentRead(component="transformer", num_bytes=24_000_000_000, seconds=reading)
    return Started(moments, (read,))


def test_reading_is_told_apart_from_building_and_set_against_the_page_cache() -> None:
    runs = [started(3.0), started(2.0), started(4.0)]
    rate = PageCacheRate(num_bytes=24, num_threads=8, bytes_per_second_of_one=2e9, bytes_per_second=10e9)
    result = with_reads(summarise_runs("python", [run.moments for run in runs]), runs, rate)
    read = result.reads["transformer"]
    assert (read.seconds.median, read.bytes_per_second, read.page_cache_ratio) == (3.0, 8e9, 0.8)
    assert read.rest_seconds == pytest.approx(4.0 - 3.0)
    text = "".join(as_text(section) for section in report._startup(result))
    assert "8.0 GB/s" in text and "80%" in text and "10.0 GB/s by 8 threads, 2.0 GB/s by one" in text
    alone = with_reads(summarise_runs("python", [runs[0].moments]), [Started(runs[0].moments)], None)
    assert alone.reads == {} and alone.page_cache is None


def test_the_page_cache_is_read_whole_and_twice(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    sizes = {"a": 3, "b": 20_000_001}
    for name, size in sizes.items():
        (tmp_path / "vae" / f"{name}.safetensors").write_bytes(bytes(size))
    files = weight_files(tmp_path)
    assert [file.stem for file in files] == ["a", "b"]
    found = page_cache_rate(files)
    assert found.num_bytes == sum(sizes.values()) and found.bytes_per_second > 0 < found.bytes_per_second_of_one
    with pytest.raises(FileNotFoundError):
        page_cache_rate([tmp_path / "gone.safetensors"])


def test_what_a_worker_begins_ends_what_it_did_before() -> None:
    timeline = Timeline(doing="processes")
    for detail in ("", "importing torch", "importing torch", "device cpu: asked for", "loading vae"):
        timeline.begins(detail)
    timeline.ready()
    assert [name for name, _ in timeline.moments] == ["processes", "importing torch", "loading vae", "ready"]


def test_a_written_checkpoint_has_the_shapes_of_the_published_one(
    writer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The autoencoder alone: the other components are of the same kind, and hundreds of megabytes."""
    monkeypatch.setattr(writer, "_SHARD_BYTES", 60_000_000)
    directory = tmp_path / "vae"
    directory.mkdir()
    config = REPOSITORY / "python/sglang/multimodal_gen/configs/published/black-forest-labs--FLUX.1-dev/vae/config.json"
    (directory / "config.json").write_bytes(config.read_bytes())
    num_bytes = writer._write_weights(directory, "diffusers", "AutoencoderKL", dtype="bf16")
    stored = open_weights(directory)
    assert len(list(directory.glob("*.safetensors"))) == 3
    assert stored.num_bytes(list(stored.tensors)) == num_bytes == 2 * 83_819_683
    found = safetensors.torch.load_file(next(iter(sorted(directory.glob("*.safetensors")))))
    assert all(tensor.isfinite().all() and tensor.dtype == torch.bfloat16 for tensor in found.values())


def test_a_shorter_checkpoint_has_fewer_blocks_of_each_kind(writer: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}))
    writer._shorten(path, 2)
    assert json.loads(path.read_text()) == {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 24}


def test_its_tokenizer_can_be_loaded(writer: ModuleType, tmp_path: Path) -> None:
    from sglang.multimodal_gen.runtime.loader.tokenizer import load_tokenizer

    writer._write_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path)("a red circle", max_length=8).ids[:3] == (3, 4, 5)
