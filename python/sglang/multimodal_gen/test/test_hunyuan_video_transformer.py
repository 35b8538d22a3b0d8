"""The native HunyuanVideo transformer against diffusers', same weights and inputs.

fp32 tolerances cover the order of summation only.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.registry import read_json_object
from sglang.multimodal_gen.runtime.bench.worker.flops import count_flops
from sglang.multimodal_gen.runtime.models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from sglang.multimodal_gen.runtime.pipelines.hunyuan_video_workloads import HUNYUAN_VIDEO_WORKLOADS
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, WorkSize
from sglang.multimodal_gen.test.tiny_hunyuan_video import TINY_TRANSFORMER, transformer_pair
from sglang.multimodal_gen.test.tiny_wan import noise

FP32 = {"rtol": 1e-4, "atol": 1e-5}
NUM_TEXT_TOKENS = 7
# The variant with 33 channels is told no guidance.
NUM_PARAMETERS = {
    "hunyuanvideo-community/HunyuanVideo": 12_821_012_544,
    "hunyuanvideo-community/HunyuanVideo-I2V": 12_821_012_544,
    "hunyuanvideo-community/HunyuanVideo-I2V-33ch": 12_810_991_680,
}


def inputs_for(
    shape: tuple[int, ...], lengths: Sequence[int], *, guidance: bool = True
) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor, Tensor | None]:
    """Latents, a timestep for each row, text with its lengths, pooled text, guidance."""
    rows = shape[0]
    return (
        noise(*shape),
        torch.linspace(987.5, 3.25, rows),
        noise(rows, NUM_TEXT_TOKENS, TINY_TRANSFORMER["text_embed_dim"], seed=2),
        list(lengths),
        noise(rows, TINY_TRANSFORMER["pooled_projection_dim"], seed=3),
        torch.linspace(6000.0, 1000.0, rows) if guidance else None,
    )


def reference_output(
    model: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    lengths: Sequence[int],
    pooled: Tensor,
    guidance: Tensor | None,
) -> Tensor:
    mask = torch.arange(text.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return model(latents, timestep, text, mask.float(), pooled, guidance, return_dict=False)[0]


@pytest.mark.parametrize(
    ("changes", "shape", "lengths"),
    [
        ({}, (2, 4, 3, 4, 6), [7, 7]),
        ({}, (3, 4, 2, 6, 2), [7, 1, 4]),
        ({}, (1, 4, 1, 2, 2), [3]),
        ({"num_layers": 0, "num_refiner_layers": 3}, (2, 4, 1, 4, 4), [2, 6]),
        ({"num_single_layers": 0, "num_attention_heads": 3}, (1, 4, 5, 2, 10), [5]),
        ({"attention_head_dim": 12, "rope_axes_dim": (2, 4, 6), "rope_theta": 10000.0}, (2, 4, 7, 4, 2), [4, 4]),
        ({"patch_size": 1, "patch_size_t": 2, "out_channels": 3}, (1, 4, 4, 3, 5), [1]),
        ({"mlp_ratio": 4.0, "in_channels": 9, "image_condition_type": "latent_concat"}, (2, 9, 2, 4, 4), [6, 7]),
        ({"image_condition_type": "token_replace"}, (2, 4, 3, 4, 6), [7, 3]),
        ({"image_condition_type": "token_replace"}, (1, 4, 1, 4, 2), [5]),
    ],
)
@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_transformer_matches_diffusers_in_fp32(
    changes: dict[str, Any], shape: tuple[int, ...], lengths: list[int], guidance: bool
) -> None:
    reference, ours = transformer_pair(guidance_embeds=guidance, **changes)
    inputs = inputs_for(shape, lengths, guidance=guidance)
    torch.testing.assert_close(ours(*inputs), reference_output(reference, *inputs), **FP32)


@pytest.mark.parametrize("condition", [None, "token_replace"])
@torch.no_grad()
def test_rows_of_other_text_lengths_equal_rows_alone(condition: str | None) -> None:
    _, ours = transformer_pair(image_condition_type=condition)
    latents, timestep, text, lengths, pooled, guidance = inputs_for((3, 4, 3, 4, 6), [2, 7, 5])
    assert guidance is not None
    together = ours(latents, timestep, text, lengths, pooled, guidance)
    for row in range(3):
        one = slice(row, row + 1)
        alone = ours(latents[one], timestep[one], text[one], lengths[one], pooled[one], guidance[one])
        torch.testing.assert_close(together[one], alone, **FP32)


@torch.no_grad()
def test_padding_is_not_computed_and_one_length_needs_no_mask() -> None:
    _, ours = transformer_pair()
    seen: list[tuple[int, bool]] = []
    ours.single_transformer_blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].shape[1], inputs[3] is None))
    )
    for lengths in ([3, 3], [3, 5], [7, 7]):
        ours(*inputs_for((2, 4, 2, 4, 4), lengths))
    assert seen == [(8 + 3, True), (8 + 5, False), (8 + 7, True)]


@torch.no_grad()
def test_every_input_matters() -> None:
    _, ours = transformer_pair()
    inputs = inputs_for((1, 4, 2, 4, 4), [5])
    base = ours(*inputs)
    for index, other in ((0, inputs[0] * 1.1), (1, inputs[1] + 5), (2, inputs[2] * 1.1), (3, [4]), (4, -inputs[4])):
        changed = ours(*inputs[:index], other, *inputs[index + 1 :])
        assert (changed - base).abs().max() > 1e-3, index
    assert (ours(*inputs[:5], torch.tensor([2000.0])) - base).abs().max() > 1e-3, "guidance"


@torch.no_grad()
def test_latents_that_do_not_divide_into_patches_are_refused() -> None:
    _, ours = transformer_pair()
    with pytest.raises(InvalidRequest, match=r"\(2, 3, 4\).*do not divide into patches of \(1, 2, 2\)"):
        ours(*inputs_for((1, 4, 2, 3, 4), [2]))


@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_diffusers() -> None:
    """Mean error over the whole output; 1.25 is what equality of precision is taken for."""
    reference, ours = transformer_pair(num_layers=3, num_single_layers=3)
    inputs = inputs_for((2, 4, 3, 8, 8), [7, 4])
    expected = reference_output(reference, *inputs)
    halved = [value.bfloat16() if torch.is_tensor(value) and value.ndim > 1 else value for value in inputs]
    error_of_ours = (ours.bfloat16()(*halved).float() - expected).abs().mean()
    error_of_theirs = (reference_output(reference.bfloat16(), *halved).float() - expected).abs().mean()
    assert error_of_ours <= 1.25 * error_of_theirs


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'; accepted: 'rms_norm'"),
        ({"image_condition_type": "concat"}, "is 'concat'; accepted: null, 'latent_concat', 'token_replace'"),
        ({"rope_axes_dim": [16, 56]}, r"rope_axes_dim is \[16, 56\].*together attention_head_dim, 128"),
        ({"rope_axes_dim": [16, 56, 64]}, r"rope_axes_dim is \[16, 56, 64\]"),
    ],
)
def test_config_refuses_what_it_cannot_honour(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        HunyuanVideoTransformerConfig.from_dict(changes)
    assert caught.value.param == next(iter(changes))
    assert HunyuanVideoTransformerConfig(out_channels=None).num_output_channels == 16


@pytest.mark.parametrize("hub_id", NUM_PARAMETERS)
def test_published_checkpoints_have_the_parameters_of_diffusers(hub_id: str) -> None:
    config = read_json_object(published_directory(hub_id) / "transformer" / "config.json")
    with torch.device("meta"):
        reference = diffusers.HunyuanVideoTransformer3DModel.from_config(config)
        ours = HunyuanVideoTransformer3DModel(HunyuanVideoTransformerConfig.from_dict(config))
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in ours.parameters()) == NUM_PARAMETERS[hub_id]


def test_the_fast_variant_has_the_same_architecture() -> None:
    fast, base = (
        read_json_object(published_directory(hub_id) / "transformer" / "config.json")
        for hub_id in ("FastVideo/FastHunyuan-diffusers", "hunyuanvideo-community/HunyuanVideo")
    )
    assert fast == base


def test_config_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        config = dict(diffusers.HunyuanVideoTransformer3DModel(num_layers=0, num_single_layers=0).config)
    defaults = HunyuanVideoTransformerConfig(num_layers=0, num_single_layers=0)
    assert HunyuanVideoTransformerConfig.from_dict(config) == defaults
    signature = inspect.signature(diffusers.HunyuanVideoTransformer3DModel.__init__).parameters
    assert {name: signature[name].default for name in ("num_layers", "num_single_layers")} == {
        "num_layers": HunyuanVideoTransformerConfig().num_layers,
        "num_single_layers": HunyuanVideoTransformerConfig().num_single_layers,
    }


def work_of(latent_shape: tuple[int, int, int, int], text: int) -> WorkSize:
    _, frames, height, width = latent_shape
    return WorkSize(
        height=8 * height,
        width=8 * width,
        num_frames=4 * frames - 3,
        latent_shape=latent_shape,
        batch_size=1,
        num_text_tokens=text,
        chunk_frames=1,
    )


@torch.no_grad()
def test_the_benchmark_does_the_same_work_as_the_reference() -> None:
    reference, ours = transformer_pair()
    size = work_of((4, 2, 4, 6), 5)
    drawing = Drawing(torch.device("cpu"), torch.float32)
    inputs = HUNYUAN_VIDEO_WORKLOADS["dit"].inputs({"transformer": ours.config}, size, drawing)
    expected = HUNYUAN_VIDEO_WORKLOADS["dit"].reference_forward(reference, inputs)
    torch.testing.assert_close(HUNYUAN_VIDEO_WORKLOADS["dit"].forward(ours, inputs, size), expected, **FP32)


def test_a_step_of_the_published_model_costs_what_is_known_of_it() -> None:
    """720p, 129 frames. Blocks of a kind cost the same, so that few of them tell the cost of all."""
    config = HunyuanVideoTransformerConfig()
    workload, size = HUNYUAN_VIDEO_WORKLOADS["dit"], work_of((16, 33, 90, 160), 256)
    inputs = workload.inputs({"transformer": config}, size, Drawing(torch.device("meta"), torch.float32))

    def tera_flops(dual: int, single: int) -> float:
        few = dataclasses.replace(config, num_layers=dual, num_single_layers=single)
        counted = count_flops(
            HunyuanVideoTransformer3DModel, few, lambda module: workload.forward(module, inputs, size)
        )
        return counted / 1e12

    both, dual, single = tera_flops(1, 1), tera_flops(2, 1), tera_flops(1, 2)
    whole = both + (config.num_layers - 1) * (dual - both) + (config.num_single_layers - 1) * (single - both)
    assert whole == pytest.approx(12_069, rel=1e-3)
