"""Which Wan model a checkpoint is, and the defaults that each was published with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sglang.multimodal_gen.configs.pipeline_configs import wan
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.registry import get_model_info, load_config, read_model_index

T2V_SMALL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
T2V_EXPERTS = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
I2V_480P = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
I2V_720P = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
FLF2V = "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"
FUN_INP = "weizhou03/Wan2.1-Fun-1.3B-InP-Diffusers"
I2V_EXPERTS = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
TI2V = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


@pytest.mark.parametrize(
    ("hub_id", "size", "length", "sampling"),
    [
        (I2V_480P, (832, 480), (81, 16), (50, 5.0, None, 3.0)),
        (I2V_720P, (1280, 720), (81, 16), (50, 5.0, None, 5.0)),
        (FLF2V, (1280, 720), (81, 16), (50, 5.0, None, None)),
        (FUN_INP, (832, 480), (81, 16), (50, 5.0, None, None)),
        (T2V_EXPERTS, (1280, 720), (81, 16), (40, 4.0, 3.0, 12.0)),
        (I2V_EXPERTS, (1280, 720), (81, 16), (40, 3.5, 3.5, 5.0)),
        (TI2V, (1280, 704), (121, 24), (50, 5.0, None, 5.0)),
    ],
)
def test_hub_ids_have_their_published_defaults(
    hub_id: str, size: tuple[int, int], length: tuple[int, int], sampling: tuple[Any, ...]
) -> None:
    defaults = get_model_info(hub_id).defaults
    assert (defaults.width, defaults.height) == size
    assert (defaults.num_frames, defaults.fps) == length
    found = (
        defaults.num_inference_steps,
        defaults.guidance_scale,
        defaults.guidance_scale_2,
        defaults.flow_shift,
    )
    assert found == sampling
    assert defaults.negative_prompt == wan.NEGATIVE_PROMPT
    assert defaults.max_sequence_length == 512


def entry_of(directory: Path, index: dict[str, Any]) -> str:
    """The name of the entry that serves a directory that is called nothing in particular."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    (directory / "model_index.json").write_text(json.dumps(index))
    resolved = get_model_info(str(directory))
    assert resolved.entry is not None
    return resolved.entry.name


def test_a_directory_of_any_name_is_what_its_index_says(tmp_path: Path) -> None:
    index_of = {hub_id: read_model_index(published_directory(hub_id)) for hub_id in (*OF_THE_INDEX, I2V_480P)}
    for hub_id, expected in OF_THE_INDEX.items():
        assert entry_of(tmp_path / "tuned", index_of[hub_id]) == expected
    saved_with_a_picture = index_of[TI2V] | {"_class_name": "WanImageToVideoPipeline"}
    assert entry_of(tmp_path / "tuned", saved_with_a_picture) == "wan2.2-ti2v-5b"
    one_expert = index_of[I2V_EXPERTS] | {"transformer_2": [None, None], "boundary_ratio": None}
    assert entry_of(tmp_path / "tuned", one_expert) == "wan-i2v"


OF_THE_INDEX = {
    T2V_SMALL: "wan2.1-t2v",
    T2V_EXPERTS: "wan2.2-t2v-a14b",
    I2V_480P: "wan2.1-i2v",
    FLF2V: "wan2.1-i2v",
    I2V_EXPERTS: "wan2.2-i2v-a14b",
    TI2V: "wan2.2-ti2v-5b",
}


def test_a_directory_with_a_published_name_has_that_models_defaults(tmp_path: Path) -> None:
    for hub_id in (I2V_480P, I2V_720P, FLF2V, FUN_INP):
        directory = tmp_path / hub_id.rpartition("/")[2]
        shutil.copytree(published_directory(hub_id), directory)
        assert get_model_info(str(directory)).defaults == get_model_info(hub_id).defaults


def test_every_entry_says_what_it_is_for() -> None:
    for entry in wan.ENTRIES:
        config = load_config(entry)
        assert config.tasks and config.max_frames > 81
        assert bool(entry.licence) == bool(entry.hub_ids)
