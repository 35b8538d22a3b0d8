"""Adapters over several ranks give what they give on one: fp32 on the CPU, over gloo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.errors import RemoteError
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.test.lora_case import load_adapters, random_adapter, save_adapters
from sglang.multimodal_gen.test.parallel_case import FORWARD_TOLERANCE, made_of
from sglang.multimodal_gen.test.parallel_pool import FAMILIES, Family, Pool
from sglang.multimodal_gen.test.pipeline_parity import LATENT_TOLERANCE, load, relative_error

pytestmark = pytest.mark.timeout(180)

LORAS: tuple[list[str], ...] = (["wide:0.8"], [], ["wide:0.5", "narrow:-1.2"])


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    found = Pool(2)
    yield found
    found.close()


def adapted(name: str, directory: Path) -> tuple[Path, Family]:
    """The checkpoint, and the family's requests with adapters of two ranks."""
    checkpoint = FAMILIES[name].save(directory / "checkpoint")
    files = save_adapters(checkpoint, directory, {"wide": 9, "narrow": 2})
    wishes = tuple({**wish, "lora": lora} for wish, lora in zip(FAMILIES[name].wishes, LORAS, strict=True))
    return checkpoint, replace(FAMILIES[name], wishes=wishes, adapters=files)


def assert_same_on(pool: Pool, shape: ReplicaShape, checkpoint: Path, family: Family, scratch: Path) -> None:
    pipeline = load(checkpoint)
    plain = made_of(pipeline, [{**wish, "lora": []} for wish in family.wishes])
    load_adapters(pipeline, family.adapters, family.merged)
    expected = made_of(pipeline, family.wishes)
    assert relative_error(torch.from_numpy(expected["latents0"]), torch.from_numpy(plain["latents0"])) > 1e-2
    for rank in pool.run(checkpoint, shape, family, scratch):
        for key, values in expected.items():
            if key.startswith(("latents", "predicted", "text")):
                tolerance = LATENT_TOLERANCE if key.startswith("latents") else FORWARD_TOLERANCE
                assert relative_error(torch.from_numpy(rank[key]), torch.from_numpy(values)) <= tolerance, key


@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "zimage"])  # one of each kind of block
def test_shards_of_adapters_add_up(name: str, pool: Pool, tmp_path: Path) -> None:
    """Of layers that hold some outputs and of those that hold some inputs, of one part or of several."""
    assert_same_on(pool, ReplicaShape(tp=2), *adapted(name, tmp_path), tmp_path)


@pytest.mark.parametrize("shape", [ReplicaShape(ulysses=2), ReplicaShape(cfg=2)], ids=["tokens", "guidance"])
@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_each_rank_has_the_adapters_of_its_tokens_and_rows(
    name: str, shape: ReplicaShape, pool: Pool, tmp_path: Path
) -> None:
    assert_same_on(pool, shape, *adapted(name, tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["wan", "sd3"])  # an encoder of ours, and those of a library
def test_adapters_of_encoders_that_are_dealt_to_ranks_add_up(name: str, pool: Pool, tmp_path: Path) -> None:
    checkpoint, family = adapted(name, tmp_path)
    tensors = load_file(family.adapters["wide"])
    for component, encoder in load(checkpoint).modules.items():
        if component.startswith("text_encoder"):
            part = random_adapter(encoder, len(component)).items()
            tensors |= {f"{component}.{key.removeprefix('transformer.')}": tensor for key, tensor in part}
    save_file(tensors, family.adapters["wide"])
    assert_same_on(pool, ReplicaShape(tp=2), checkpoint, family, tmp_path)


def test_shards_with_biases_and_merged_weights_add_up(pool: Pool, tmp_path: Path) -> None:
    """The bias of a layer that holds some inputs is added on one rank."""
    checkpoint, family = adapted("wan", tmp_path)
    for name, file in family.adapters.items():
        tensors = load_file(file)
        biases = {
            key.replace("lora_B.weight", "lora_B.bias"): tensor.mean(1)
            for key, tensor in tensors.items()
            if "lora_B" in key
        }
        save_file(tensors | biases, file)
        assert biases, name
    assert_same_on(pool, ReplicaShape(tp=2), checkpoint, family, tmp_path)
    merged = replace(family, merged={"wide": 0.8, "narrow": 0.5})
    assert_same_on(pool, ReplicaShape(tp=2), checkpoint, merged, tmp_path)


def test_an_engine_of_two_ranks_sets_merges_and_refuses_on_both(tmp_path: Path) -> None:
    checkpoint, family = adapted("wan", tmp_path)
    wish: dict[str, Any] = {**family.wishes[0], "save_output": False, "return_latents": True, "output_type": "latent"}
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no safetensors")

    def latents(**changes: Any) -> np.ndarray:
        result = engine.generate(wish | changes)
        assert isinstance(result, GenerationResult) and result.latents is not None
        return result.latents

    with DiffGenerator.from_pretrained(str(checkpoint), tp_size=2, precision="fp32") as engine:
        plain = latents(lora=[])
        engine.set_lora("wide", str(family.adapters["wide"]))
        beside = latents(lora=["wide"])
        with pytest.raises(RemoteError, match="truncated or no safetensors file"):
            engine.set_lora("bad", str(bad))
        engine.merge_lora_weights()
        np.testing.assert_allclose(latents(lora=[]), beside, rtol=1e-3, atol=1e-4)
        engine.unmerge_lora_weights()
        np.testing.assert_array_equal(latents(lora=[]), plain)
        assert engine.status().num_worker_restarts == 0
