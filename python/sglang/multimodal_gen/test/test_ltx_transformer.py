"""The native LTX-Video transformer against diffusers', same weights and inputs.

fp32 tolerances cover the order of summation only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.ltx import LTXVideoTransformerConfig
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.distributed.parallel_state import ParallelContext, ProcessAxis
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.rotary import fractional_rotary_table, grid_positions
from sglang.multimodal_gen.runtime.models.dits.ltx import LTXVideoTransformer3DModel
from sglang.multimodal_gen.runtime.pipelines.ltx_workloads import LTX_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, WorkSize
from sglang.multimodal_gen.test.tiny_ltx import TINY_TRANSFORMER, transformer_pair
from sglang.multimodal_gen.test.tiny_wan import noise

FP32 = {"rtol": 1e-4, "atol": 1e-5}
SCALES = (8 / 25, 32, 32)
BASES = (20, 2048, 2048)


@dataclass(kw_only=True)
class Inputs:
    """Arguments of one call, for either model."""

    grid: tuple[int, int, int] = (3, 2, 4)
    text_lengths: list[int] = field(default_factory=lambda: [7, 3])
    num_text_tokens: int = 7
    timesteps: Tensor | None = None
    channels: int = TINY_TRANSFORMER["in_channels"]

    def __post_init__(self) -> None:
        rows, frames, height, width = len(self.text_lengths), *self.grid
        self.tokens = noise(rows, frames * height * width, self.channels)
        self.text = noise(rows, self.num_text_tokens, TINY_TRANSFORMER["caption_channels"], seed=2)
        if self.timesteps is None:
            self.timesteps = torch.linspace(987.5, 3.25, rows)

    def reference(self, model: nn.Module) -> Tensor:
        frames, height, width = self.grid
        timesteps = self.timesteps
        if timesteps.ndim == 2:  # diffusers takes one for each token
            timesteps = timesteps.repeat_interleave(self.tokens.shape[1] // timesteps.shape[1], dim=1)
        mask = torch.arange(self.num_text_tokens) < torch.tensor(self.text_lengths).unsqueeze(1)
        return model(
            hidden_states=self.tokens,
            encoder_hidden_states=self.text,
            timestep=timesteps,
            encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=SCALES,
            return_dict=False,
        )[0]

    def table(self, config: LTXVideoTransformerConfig) -> Tensor:
        axes = zip(grid_positions(*self.grid).float().unbind(-1), SCALES, BASES, strict=True)
        positions = torch.stack([axis * scale / base for axis, scale, base in axes], dim=-1)
        return fractional_rotary_table(positions, config.hidden_size, config.num_attention_heads)

    def ours(self, model: LTXVideoTransformer3DModel, rows: slice = slice(None)) -> Tensor:
        return model(
            self.tokens[rows], self.timesteps[rows], self.text[rows], self.table(model.config), self.text_lengths[rows]
        )


@pytest.mark.parametrize(
    ("changes", "inputs"),
    [
        ({}, Inputs()),
        ({}, Inputs(grid=(1, 1, 1), text_lengths=[1], num_text_tokens=9)),
        ({"attention_head_dim": 12, "cross_attention_dim": 24}, Inputs(grid=(2, 5, 3), text_lengths=[4, 4])),
        ({"num_attention_heads": 3, "cross_attention_dim": 30}, Inputs(text_lengths=[1, 7, 2])),
        ({"num_layers": 4, "attention_head_dim": 14, "cross_attention_dim": 28}, Inputs(grid=(4, 3, 3))),
        ({"num_attention_heads": 1, "cross_attention_dim": 10, "norm_eps": 1e-2}, Inputs(text_lengths=[5])),
        ({"out_channels": 5, "in_channels": 3}, Inputs(channels=3, text_lengths=[7])),
        ({"attention_bias": False, "attention_out_bias": False}, Inputs()),
    ],
)
@torch.no_grad()
def test_transformer_matches_diffusers_in_fp32(changes: dict[str, Any], inputs: Inputs) -> None:
    reference, ours = transformer_pair(**changes)
    torch.testing.assert_close(inputs.ours(ours), inputs.reference(reference), **FP32)


@torch.no_grad()
@pytest.mark.parametrize("num_groups", [1, 3, 12])
def test_timesteps_of_frames_or_tokens_match_diffusers(num_groups: int) -> None:
    """Image to video: the given first frame has timestep 0."""
    reference, ours = transformer_pair()
    timesteps = torch.rand(2, num_groups, generator=torch.Generator().manual_seed(3)) * 1000
    timesteps[:, 0] = 0
    inputs = Inputs(timesteps=timesteps)
    expected = inputs.reference(reference)
    torch.testing.assert_close(inputs.ours(ours), expected, **FP32)


@torch.no_grad()
def test_samples_sharing_a_batch_equal_samples_alone() -> None:
    _, ours = transformer_pair()
    inputs = Inputs(text_lengths=[3, 7, 1])
    together = inputs.ours(ours)
    for row in range(3):
        rows = slice(row, row + 1)
        torch.testing.assert_close(together[rows], inputs.ours(ours, rows), **FP32)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter() -> None:
    _, ours = transformer_pair()
    inputs = Inputs(text_lengths=[2, 5])
    expected = inputs.ours(ours)
    inputs.text[0, 2:], inputs.text[1, 5:] = 50.0, -50.0
    assert torch.equal(inputs.ours(ours), expected)
    inputs.text[0, 1] += 1.0
    assert (inputs.ours(ours)[0] - expected[0]).abs().max() > 1e-3, "what is no padding must matter"


def test_gradients_match_diffusers() -> None:
    reference, ours = transformer_pair()
    inputs = Inputs()
    inputs.reference(reference).square().mean().backward()
    inputs.ours(ours).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        # Gradients sum over all tokens, so their rounding is that of the largest terms.
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_bf16_error_is_no_worse_than_diffusers() -> None:
    """1.25 leaves room for where single values happen to round."""
    reference, ours = transformer_pair(num_layers=4)
    inputs = Inputs(grid=(4, 6, 6))
    exact = inputs.ours(ours)
    reference.to(torch.bfloat16), ours.to(torch.bfloat16)
    inputs.tokens, inputs.text = inputs.tokens.bfloat16(), inputs.text.bfloat16()
    output = inputs.ours(ours)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() <= 1.25 * (inputs.reference(reference).float() - exact).norm()


@torch.no_grad()
def test_the_rotary_table_is_that_of_diffusers_to_the_last_bit() -> None:
    """Its highest frequency turns 2,500 times over the largest frame: one rounding error more would be visible."""
    reference, ours = transformer_pair(attention_head_dim=64, num_attention_heads=8, cross_attention_dim=512)
    inputs = Inputs(grid=(21, 3, 22))
    cosines, sines = reference.rope(inputs.tokens, *inputs.grid, SCALES)
    table = inputs.table(ours.config).flatten(2, 3)
    assert torch.equal(table[..., 0], cosines[:1, :, ::2])
    assert torch.equal(table[..., 1], sines[:1, :, ::2])


def test_each_rank_takes_the_rotations_of_its_own_heads() -> None:
    config = LTXVideoTransformerConfig(**TINY_TRANSFORMER)
    table = Inputs().table(config)
    for rank in range(2):
        tp = ParallelContext(tp=ProcessAxis(size=2, rank=rank))
        ours = LTXVideoTransformer3DModel(config, LayerContext(parallel=tp))
        assert torch.equal(ours.of_own_heads(table), table[:, :, rank : rank + 1])


@torch.no_grad()
def test_block_compiles_as_one_graph_and_computes_the_same() -> None:
    _, ours = transformer_pair(num_layers=1)
    dim = ours.config.hidden_size
    mask = torch.tensor([[True, False], [True, True]])[:, None, None]
    table = Inputs().table(ours.config)
    inputs = (noise(2, 24, dim), noise(2, 2, dim, seed=2), mask, noise(2, 3, 6, dim, seed=3), table)
    compiled = torch.compile(ours.transformer_blocks[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), ours.transformer_blocks[0](*inputs), **FP32)


@pytest.mark.parametrize(
    ("hub_id", "num_transformer_parameters", "num_vae_parameters"),
    [
        ("Lightricks/LTX-Video", 1_923_385_472, 419_193_649),
        ("a-r-r-o-w/LTX-Video-0.9.1-diffusers", 1_923_385_472, 934_976_434),
        ("Lightricks/LTX-Video-0.9.5", 1_923_385_472, 1_246_913_522),
        ("Lightricks/LTX-Video-0.9.7-dev", 13_042_569_344, 1_246_913_522),
        ("Lightricks/LTX-Video-0.9.8-13B-distilled", 13_042_569_344, 1_246_913_522),
    ],
)
def test_published_configs_have_the_parameters_of_the_checkpoints(
    hub_id: str, num_transformer_parameters: int, num_vae_parameters: int
) -> None:
    def config(component: str) -> dict[str, Any]:
        return read_json_object(published_directory(hub_id) / component / "config.json")

    with torch.device("meta"):
        ours = LTXVideoTransformer3DModel(LTXVideoTransformerConfig.from_dict(config("transformer")))
        theirs = diffusers.LTXVideoTransformer3DModel.from_config(config("transformer"))
        vae = diffusers.AutoencoderKLLTXVideo.from_config(config("vae"))
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == num_transformer_parameters
    assert sum(parameter.numel() for parameter in vae.parameters()) == num_vae_parameters


@torch.no_grad()
def test_benchmarks_run_the_same_work_on_both() -> None:
    reference, ours = transformer_pair()
    size = WorkSize(
        height=64, width=96, num_frames=17, latent_shape=(8, 3, 2, 3), batch_size=2, num_text_tokens=5, chunk_frames=3
    )
    workload = LTX_WORKLOADS["dit"]
    inputs = workload.inputs({"transformer": ours.config}, size, Drawing(torch.device("cpu"), torch.float32))
    torch.testing.assert_close(
        workload.forward(ours, inputs, size), workload.reference_forward(reference, inputs), **FP32
    )


def test_config_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        config = dict(diffusers.LTXVideoTransformer3DModel().config)
    assert LTXVideoTransformerConfig.from_dict(config) == LTXVideoTransformerConfig()


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        ("patch_size", 2),
        ("patch_size_t", 2),
        ("activation_fn", "gelu"),
        ("qk_norm", "rms_norm"),
        ("norm_elementwise_affine", True),
        ("cross_attention_dim", 24),
    ],
)
def test_an_architecture_that_is_not_ours_is_refused(field_name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{field_name} is {value!r}; only") as caught:
        LTXVideoTransformerConfig.from_dict(TINY_TRANSFORMER | {field_name: value})
    assert caught.value.param == field_name
