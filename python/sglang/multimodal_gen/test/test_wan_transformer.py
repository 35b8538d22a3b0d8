"""The native Wan transformer against diffusers', same weights and inputs.

fp32 tolerances cover the order of summation only.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_wan
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.layers.attention.dispatch import FixedKernel
from sglang.multimodal_gen.runtime.layers.attention.kernels import TorchSDPA
from sglang.multimodal_gen.runtime.layers.context import AttentionPlan, LayerContext
from sglang.multimodal_gen.runtime.layers.rotary import rotary_table_3d
from sglang.multimodal_gen.runtime.models.dits.wan import WanBlock, WanTransformer3DModel
from sglang.multimodal_gen.test.tiny_wan import TINY_TRANSFORMER, noise, randomised, transformer_pair

FP32 = {"rtol": 1e-4, "atol": 1e-5}


def wan_inputs(shape: tuple[int, ...] = (2, 4, 3, 4, 6), num_text_tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, one timestep for each sample, text."""
    timesteps = torch.linspace(987.5, 3.25, shape[0])
    return noise(*shape), timesteps, noise(shape[0], num_text_tokens, TINY_TRANSFORMER["text_dim"], seed=2)


def reference_output(model: nn.Module, *inputs: Tensor | None) -> Tensor:
    return model(*inputs, return_dict=False)[0]


@pytest.mark.parametrize(
    ("changes", "shape", "num_text_tokens"),
    [
        ({}, (2, 4, 3, 4, 6), 7),
        ({}, (1, 4, 1, 2, 2), 1),
        ({"num_attention_heads": 3, "num_layers": 1}, (1, 4, 5, 6, 2), 3),
        ({"num_attention_heads": 1, "num_layers": 4}, (3, 4, 2, 10, 14), 12),
        ({"attention_head_dim": 32, "in_channels": 6}, (1, 6, 9, 2, 10), 5),
        ({"patch_size": (2, 1, 3)}, (2, 4, 4, 5, 9), 4),
        ({"cross_attn_norm": False, "eps": 1e-3}, (2, 4, 1, 6, 6), 2),
        ({"out_channels": 9, "freq_dim": 32}, (2, 4, 3, 2, 8), 6),
    ],
)
@torch.no_grad()
def test_transformer_matches_diffusers_in_fp32(
    changes: dict[str, Any], shape: tuple[int, ...], num_text_tokens: int
) -> None:
    reference, ours = transformer_pair(**changes)
    inputs = wan_inputs(shape, num_text_tokens)
    torch.testing.assert_close(ours(*inputs), reference_output(reference, *inputs), **FP32)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[3, 3], [0, 5], [1, 8], [8, 8], [7, 2]])
def test_padding_that_is_folded_counts_as_if_it_stood_there(lengths: list[int]) -> None:
    reference, ours = transformer_pair()
    latents, timesteps, text = wan_inputs(num_text_tokens=8)
    for row, length in enumerate(lengths):
        text[row, length:] = 0
    seen: list[int] = []
    ours.condition_embedder.text_embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    expected = reference_output(reference, latents, timesteps, text)
    torch.testing.assert_close(ours(latents, timesteps, text, text_lengths=lengths), expected, **FP32)
    assert seen == [min(max(lengths) + 1, 8)], "padding is computed once"


@torch.no_grad()
def test_padding_is_not_folded_where_the_kernel_takes_no_mask() -> None:
    class Unmasked(TorchSDPA):
        name = "unmasked"

    plan = AttentionPlan(source=FixedKernel(role="cross", fixed=Unmasked()))
    _, ours = transformer_pair()
    config = WanTransformerConfig.from_dict(TINY_TRANSFORMER)
    unfolded = WanTransformer3DModel(config, LayerContext(cross_attention=plan))
    unfolded.load_state_dict(ours.state_dict())
    latents, timesteps, text = wan_inputs()
    text[:, 2:] = 0
    result = unfolded(latents, timesteps, text, text_lengths=[2, 2])
    assert torch.equal(result, unfolded(latents, timesteps, text))


@torch.no_grad()
def test_per_token_timesteps_match_diffusers() -> None:
    """Wan2.2 5B: the tokens of a given first frame have timestep 0."""
    reference, ours = transformer_pair()
    latents, _, text = wan_inputs()
    timesteps = torch.rand(2, 3 * 2 * 3, generator=torch.Generator().manual_seed(3)) * 1000
    timesteps[:, :6] = 0
    expected = reference_output(reference, latents, timesteps, text)
    torch.testing.assert_close(ours(latents, timesteps, text), expected, **FP32)


@torch.no_grad()
def test_one_timestep_for_each_frame_equals_one_for_each_token() -> None:
    """A picture at 0 before noise: only as many embeddings as frames are computed, and the result is diffusers'."""
    reference, ours = transformer_pair()
    latents, _, text = wan_inputs()
    timesteps = torch.tensor([[0.0, 731.0, 731.0], [250.5, 250.5, 250.5]])
    expected = reference_output(reference, latents, timesteps.repeat_interleave(2 * 3, dim=1), text)
    torch.testing.assert_close(ours(latents, timesteps, text), expected, **FP32)
    alike = ours(latents[1:], timesteps[1, :1], text[1:])
    torch.testing.assert_close(alike, expected[1:], **FP32)


@torch.no_grad()
@pytest.mark.parametrize("num_positions", [None, 10])
def test_image_conditioning_matches_diffusers(num_positions: int | None) -> None:
    """With positions (first and last frame) a sample's images arrive as two rows. diffusers wants 512 text tokens."""
    reference, ours = transformer_pair(image_dim=14, added_kv_proj_dim=48, pos_embed_seq_len=num_positions)
    inputs = wan_inputs(num_text_tokens=512)
    image = noise(4, 5, 14, seed=4) if num_positions else noise(2, 5, 14, seed=4)
    expected = reference_output(reference, *inputs, image)
    torch.testing.assert_close(ours(*inputs, image), expected, **FP32)
    assert (ours(*inputs, image.flip(-1)) - expected).abs().max() > 1e-2, "the image must matter"


@torch.no_grad()
def test_samples_sharing_a_batch_equal_samples_alone() -> None:
    _, ours = transformer_pair()
    latents, timesteps, text = wan_inputs((3, 4, 3, 4, 6))
    together = ours(latents, timesteps, text)
    for row in range(3):
        alone = ours(latents[row : row + 1], timesteps[row : row + 1], text[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, **FP32)


def test_gradients_match_diffusers() -> None:
    reference, ours = transformer_pair()
    inputs = wan_inputs()
    reference_output(reference, *inputs).square().mean().backward()
    ours(*inputs).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        # Gradients sum over all tokens, so their rounding is that of the largest terms.
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_training_works_after_inference_mode_filled_the_rotary_tables() -> None:
    rotary_table_3d.cache_clear()
    _, ours = transformer_pair()
    with torch.inference_mode():
        ours(*wan_inputs())
    ours(*wan_inputs()).mean().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


@torch.no_grad()
def test_a_model_made_on_meta_computes_the_same_after_assigning_weights() -> None:
    reference, _ = transformer_pair()
    with torch.device("meta"):
        ours = WanTransformer3DModel(WanTransformerConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict(), strict=True, assign=True)
    inputs = wan_inputs()
    torch.testing.assert_close(ours(*inputs), reference_output(reference, *inputs), **FP32)


@torch.no_grad()
def test_bf16_error_is_no_worse_than_diffusers() -> None:
    """Both keep the same parts in fp32; 1.25 leaves room for where single values happen to round."""
    reference, ours = transformer_pair(num_layers=4)
    inputs = wan_inputs((2, 4, 5, 8, 8), 16)
    exact = ours(*inputs)
    for model in (reference, ours):
        for name, parameter in model.named_parameters():
            if not set(name.split(".")) & set(WanTransformer3DModel.keep_in_fp32):
                parameter.data = parameter.data.bfloat16()
    latents, timesteps, text = inputs
    inputs = (latents.bfloat16(), timesteps, text.bfloat16())
    theirs = (reference_output(reference, *inputs).float() - exact).norm()
    output = ours(*inputs)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() <= 1.25 * theirs


def test_keep_in_fp32_is_what_diffusers_keeps() -> None:
    kept = transformer_wan.WanTransformer3DModel._keep_in_fp32_modules
    assert set(WanTransformer3DModel.keep_in_fp32) == set(kept) - {"rope"}, "our rotary tables are no parameters"


@torch.no_grad()
def test_block_at_the_width_of_the_1_3b_model_matches_diffusers() -> None:
    config = WanTransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    dim, grid = config.hidden_size, (2, 3, 4)
    theirs = randomised(transformer_wan.WanTransformerBlock(dim, 8960, 12, cross_attn_norm=True))
    with torch.device("meta"):
        ours = WanBlock(config, LayerContext())
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    rope = transformer_wan.WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    hidden_states, text, temb = noise(2, 24, dim), noise(2, 9, dim, seed=2), noise(2, 6, dim, seed=3)
    expected = theirs(hidden_states, text, temb, rope(torch.empty(1, 16, 2, 6, 8)))
    freqs_cis = rotary_table_3d(grid, 128, torch.device("cpu"))
    actual = ours(hidden_states, text, None, None, temb.unsqueeze(1), freqs_cis)
    torch.testing.assert_close(actual, expected, **FP32)


@torch.no_grad()
def test_block_compiles_as_one_graph_and_computes_the_same() -> None:
    _, ours = transformer_pair(num_layers=1)
    dim = ours.config.hidden_size
    freqs_cis = rotary_table_3d((1, 2, 3), ours.config.attention_head_dim, torch.device("cpu"))
    text = noise(2, 4, dim, seed=2)
    inputs = (noise(2, 6, dim), text, None, None, noise(2, 1, 6, dim, seed=3), freqs_cis)
    compiled = torch.compile(ours.blocks[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), ours.blocks[0](*inputs), **FP32)


@pytest.mark.parametrize(
    ("shape", "image", "sentence"),
    [
        ((1, 4, 3, 5, 6), None, r"latents of \(3, 5, 6\).*patches of \(1, 2, 2\)"),
        ((1, 4, 9, 2, 2), None, r"9x1x1 patches; the model has positions for 8"),
        ((1, 4, 1, 2, 2), torch.ones(1, 3, 14), "takes no image"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape: tuple[int, ...], image: Tensor | None, sentence: str) -> None:
    ours = WanTransformer3DModel(WanTransformerConfig(**TINY_TRANSFORMER, rope_max_seq_len=8))
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        ours(*wan_inputs(shape), image)
    assert type(caught.value) is InvalidRequest
