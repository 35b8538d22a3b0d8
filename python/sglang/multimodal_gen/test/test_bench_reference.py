"""`bench pipeline --compare diffusers --random-weights`: both sides have the same numbers and read the same ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sglang.multimodal_gen.configs.sample.sampling_params import GENERAL_DEFAULTS, SamplingParams
from sglang.multimodal_gen.errors import UnsupportedModel
from sglang.multimodal_gen.registry import read_model_index
from sglang.multimodal_gen.runtime.bench.messages import ReferenceCall, ReferenceTask
from sglang.multimodal_gen.runtime.bench.worker.model import find_model
from sglang.multimodal_gen.runtime.bench.worker.reference_components import TransformersTokenizer
from sglang.multimodal_gen.runtime.bench.worker.reference_pipeline import ReferenceRunner, load_pipeline
from sglang.multimodal_gen.runtime.bench.worker.reporting import Parent
from sglang.multimodal_gen.runtime.loader.random_weights import StandInTokenizer
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ServerArgs
from sglang.multimodal_gen.test.pipeline_parity import run
from sglang.multimodal_gen.test.tiny_families import FAMILIES, wish_of
from sglang.multimodal_gen.test.tiny_ltx import TINY_LTXS, save_tiny_ltx
from sglang.multimodal_gen.test.tiny_sd3 import TINY_SD3S, save_tiny_sd3
from sglang.multimodal_gen.test.tiny_wan_image import TINY_WAN_IMAGES, save_tiny_wan_image
from sglang.multimodal_gen.test.tiny_zimage import TINY_Z_IMAGES, save_tiny_zimage


def save_without_entries(directory: Path) -> Path:
    """Of a checkpoint without some components, whose index does not even say so."""
    index = save_tiny_sd3(directory, TINY_SD3S["without_t5"]) / "model_index.json"
    entries = json.loads(index.read_text())
    index.write_text(json.dumps({name: value for name, value in entries.items() if value != [None, None]}))
    return directory


TIMED = {"decode_timestep": 0.05, "decode_noise_scale": 0.5, "fps": 12}
# Each with the family whose requests it takes, and what they say beside.
CHECKPOINTS: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any]]] = {
    **{family: (family, save, {}) for family, (save, _) in FAMILIES.items()},
    "ltx condition": ("ltx", lambda path: save_tiny_ltx(path, TINY_LTXS["condition"]), TIMED),
    "ltx with a noisy decoder": ("ltx", lambda path: save_tiny_ltx(path, TINY_LTXS["noisy"]), {}),
    "sd3 without t5": ("sd3", save_without_entries, {}),
    "zimage with a head": ("zimage", lambda path: save_tiny_zimage(path, TINY_Z_IMAGES["turbo"]), {}),
}
PROMPT = "a red circle, and a blue star on the left"
# NumPy warns of how diffusers hands it a tensor of timesteps.
_TOLD_OF_COPIES = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers.schedulers"
)
# The prompt is longer than the shorter one, templates are shorter than the longer one.
LENGTHS = (8, 64)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take many times as long as one does for work this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def reference_of(directory: Path, **options: Any) -> tuple[ReferenceRunner, ServerArgs, SamplingParams]:
    """The reference's process in this one, its options and the model's defaults."""
    options = {"random_weights": True, "device": "cpu", **options}
    args = ServerArgs.from_kwargs(model_path=str(directory), **options)
    task = ReferenceTask(engine=EngineConfig.of_this_process(args, run_dir=""), directory=str(directory.parent))
    ours, _theirs = Pipe()
    model = find_model(args.model, "dit", Parent(ours))
    context = model.load_context(args, lambda _: None)
    return ReferenceRunner(load_pipeline(task, model, context), context.device, task.directory), args, model.defaults


def check_classes(pipeline: Any, directory: Path) -> None:
    """Whole models and not the parts of them that we use, which would do less work."""
    for name, listed in read_model_index(directory).items():
        if isinstance(module := vars(pipeline).get(name), nn.Module):
            assert type(module).__name__ == listed[1]


@_TOLD_OF_COPIES
@pytest.mark.parametrize("has_tokenizers", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_with_random_weights_diffusers_makes_what_ours_makes(name: str, has_tokenizers: bool, tmp_path: Path) -> None:
    """Without tokenizers is as the configs in the package are."""
    family, save, values = CHECKPOINTS[name]
    directory = save(tmp_path / "model")
    for tokenizer in () if has_tokenizers else directory.glob("tokenizer*"):
        shutil.rmtree(tokenizer)
    with torch.inference_mode():
        runner, args, defaults = reference_of(directory)
        check_classes(runner.pipeline, directory)
        pipeline = build_pipeline(args.model, args.execution)
        for length in LENGTHS:
            wish = wish_of(family, prompt=PROMPT, max_sequence_length=length, num_inference_steps=2, **values)
            params = SamplingParams.from_values(wish).filled_from(defaults, GENERAL_DEFAULTS)
            _, ours = run(pipeline, params)
            [theirs] = np.load(runner.run(ReferenceCall(params=params, seeds=(1,))).frames_file)
            # A value that lies on the border between two steps of 1/255 may be rounded either way.
            assert np.abs(theirs.astype(int) - ours).max() <= 1
            assert ours.std() > 5, "a flat picture would agree with anything"


@_TOLD_OF_COPIES
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "vae_precision": "fp32"},
        {"precision": "bf16", "vae_precision": "fp32", "random_weights": False},
        {"quantization": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["flux", "ltx condition"])
def test_diffusers_has_its_own_precisions(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Its pipelines know neither an autoencoder with another dtype nor our quantised weights."""
    family, save, values = CHECKPOINTS[name]
    directory = save(tmp_path / "model")
    with torch.inference_mode():
        runner, _, defaults = reference_of(directory, **options)
        params = SamplingParams.from_values(wish_of(family, **values)).filled_from(defaults, GENERAL_DEFAULTS)
        done = runner.run(ReferenceCall(params=params, seeds=(1,)))
    assert np.load(done.frames_file).std() > 5


def test_a_component_that_cannot_be_made_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    directory = save_tiny_wan_image(tmp_path / "model", TINY_WAN_IMAGES["i2v"])
    with pytest.raises(UnsupportedModel, match=r"compare: diffusers' pipeline wants a \w+ as its image_processor"):
        reference_of(directory)


def test_the_stand_in_pads_cuts_and_names_ids_as_pipelines_ask_for() -> None:
    stand_in = StandInTokenizer()
    tokenizer = TransformersTokenizer(stand_in, model_max_length=5)
    whole = stand_in("a red circle", max_length=8).ids
    batch = tokenizer(["a red circle", "a"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [list(whole), [*whole[:2], 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert tokenizer("a", padding="max_length").input_ids.tolist() == [[*whole[:2], 0, 0, 0]]
    assert tokenizer("a red circle", max_length=2, truncation=True).input_ids.tolist() == [list(whole[:2])]
    assert tokenizer("a " * 9, padding="longest").input_ids.shape == (1, 10), "whole texts, to tell what was cut"
    assert tokenizer.batch_decode(torch.tensor([whole[:2]])) == [f"{whole[0]} {whole[1]}"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
