"""Modules without a checkpoint: what random weights are, and what they leave as a checkpoint would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import CorruptCheckpoint, NotAModel
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.loader.component_loader import LoadContext
from sglang.multimodal_gen.runtime.loader.random_weights import RandomSource, StandInTokenizer
from sglang.multimodal_gen.runtime.loader.tokenizer import PromptTokenizer
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan
from sglang.multimodal_gen.runtime.pipelines.wan import WanPipeline
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ModelArgs

CPU = torch.device("cpu")


@pytest.fixture
def configs(wan_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """The configs of a tiny checkpoint and nothing else of it."""
    source = wan_checkpoint("plain")
    for file in source.rglob("*config*.json"):
        if "tokenizer" not in file.parent.name:
            target = tmp_path / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    (tmp_path / "model_index.json").write_bytes((source / "model_index.json").read_bytes())
    return tmp_path


def transformer(configs: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    context = LoadContext(device=CPU, dtype=dtype, layers=LayerContext(), source=RandomSource(seed))
    module = WanPipeline.components["transformer"](configs / "transformer", "WanTransformer3DModel", context)
    assert isinstance(module, WanTransformer3DModel)
    return module


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(configs: Path) -> None:
    first, again, other = (transformer(configs, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_bf16_weights_are_the_rounded_fp32_ones_and_norms_stay_in_fp32(configs: Path) -> None:
    exact, rounded = transformer(configs).state_dict(), transformer(configs, dtype=torch.bfloat16).state_dict()
    kept = {name for name, tensor in rounded.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in rounded if set(name.split(".")) & set(WanTransformer3DModel.keep_in_fp32)}
    for name, tensor in rounded.items():
        torch.testing.assert_close(tensor.float(), exact[name], rtol=2**-8, atol=2e-3)


def test_matrices_are_scaled_by_their_fan_in_and_norms_lie_around_one(configs: Path) -> None:
    for name, tensor in transformer(configs).state_dict().items():
        if name.endswith(("norm_q.weight", "norm2.weight")):
            assert abs(tensor.mean() - 1) < 0.1, name
        elif tensor.ndim >= 2 and tensor.numel() > 500 and "table" not in name:
            # Sixty-odd numbers are within a third of their deviation with near certainty.
            assert tensor.std() * (tensor.numel() / tensor.shape[0]) ** 0.5 == pytest.approx(1, rel=0.3), name


def test_weights_beyond_the_pool_repeat_without_lining_up(configs: Path) -> None:
    """A tensor larger than the pool of numbers has no two equal rows."""
    module = torch.nn.Linear(1500, 1500, bias=False, device="meta")
    tensors = RandomSource().tensors_for(configs, module, dtype_of=lambda _: torch.float32, device=CPU)
    assert tensors["weight"].unique(dim=0).shape == (1500, 1500)


def test_a_pipeline_runs_from_configs_alone_and_its_values_are_finite(configs: Path) -> None:
    pipeline = build_pipeline(ModelArgs(model_path=str(configs), random_weights=True))
    params = SamplingParams(prompt="a b", negative_prompt="", seed=1, width=32, height=32, num_frames=5)
    req = pipeline.admit("r", params.filled_from(SamplingParams(num_inference_steps=2)))
    with torch.inference_mode():
        for phase in req.phases:
            for _ in range(phase.units):
                outputs = pipeline.run_unit(phase.name, [req])
    assert req.latents is not None and req.latents.isfinite().all()
    assert outputs[0].frames.float().std() > 1
    assert isinstance(pipeline.vae, AutoencoderKLWan)


def test_configs_alone_are_refused_as_a_checkpoint(configs: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="tokenizer"):
        build_pipeline(ModelArgs(model_path=str(configs)))


def test_a_directory_with_a_tokenizer_keeps_it(wan_checkpoint: Callable[[str], Path]) -> None:
    assert isinstance(RandomSource().tokenizer(wan_checkpoint("plain") / "tokenizer"), PromptTokenizer)


def test_a_hub_id_without_published_configs_is_refused_and_not_downloaded() -> None:
    with pytest.raises(NotAModel, match=r"known are .*Wan-AI/"):
        build_pipeline(ModelArgs(model_path="nobody/nothing", random_weights=True))


def test_the_stand_in_tokenizer_counts_words_and_a_cut_text_has_the_first_ids() -> None:
    tokenizer = StandInTokenizer()
    whole, cut = tokenizer("a red star", max_length=8), tokenizer("a red star", max_length=3)
    assert len(whole.ids) == whole.num_tokens == 4 and not whole.was_cut
    assert cut.ids == whole.ids[:3] and cut.was_cut
    assert tokenizer("", max_length=8).ids == (1,)
    assert len({tokenizer(word, max_length=8).ids for word in ("a", "red", "star")}) == 3
