"""What surrounds the convolutions of an autoencoder, by plain formulas; kernels are compared in `test_fused.py`."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.fused_frames import (
    Footage,
    Moments,
    ScaleShift,
    cell_step,
    group_moments,
    norm_frames,
    norm_groups,
    spread_frames,
    sum_frames,
    sum_with_moments,
    upsample_frames,
)
from sglang.multimodal_gen.test.tiny_wan import noise

FP32 = {"rtol": 1e-5, "atol": 1e-5}
_SHAPE = (2, 6, 3, 4, 5)


def per_channel(values: Tensor) -> Tensor:
    """[C] beside [B, C, T, H, W], in fp64."""
    return values.double().view(-1, 1, 1, 1)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_norm_is_its_formula(has_bias: bool, silu: bool) -> None:
    frames, weight, bias = noise(*_SHAPE), noise(6, seed=2), noise(6, seed=3) if has_bias else None
    exact = frames.double() + (0 if bias is None else per_channel(bias))
    exact = F.normalize(exact, dim=1) * 6**0.5 * per_channel(weight)
    exact = exact * exact.sigmoid() if silu else exact
    torch.testing.assert_close(norm_frames(frames, weight, bias=bias, silu=silu).double(), exact, **FP32)


@pytest.mark.parametrize("has_weight", [False, True])
def test_the_norm_is_modulated_for_each_sample(has_weight: bool) -> None:
    frames, scale, shift = noise(*_SHAPE), noise(2, 6, seed=2), noise(2, 6, seed=3)
    weight = noise(6, seed=4) if has_weight else None
    exact = frames.double() / (frames.double().square().mean(dim=1, keepdim=True) + 0.01).sqrt()
    exact = exact * (1 if weight is None else per_channel(weight))
    exact = exact * (1 + scale.double()[..., None, None, None]) + shift.double()[..., None, None, None]
    found = norm_frames(frames, weight, modulation=ScaleShift(scale=scale, shift=shift), silu=False, eps=0.01)
    torch.testing.assert_close(found.double(), exact, **FP32)
    # The same for all samples, through SiLU.
    same = ScaleShift(scale=torch.zeros(2, 6), shift=torch.zeros(2, 6))
    torch.testing.assert_close(norm_frames(frames, weight, modulation=same), norm_frames(frames, weight))


def test_the_norm_goes_where_it_is_told_to() -> None:
    frames, weight, room = noise(*_SHAPE), noise(6, seed=2), torch.zeros(2, 6, 5, 6, 7)
    inner = room[:, :, 2:, 1:-1, 1:-1]
    assert norm_frames(frames, weight, out=inner).data_ptr() == inner.data_ptr()
    torch.testing.assert_close(inner, norm_frames(frames, weight))
    inner.zero_()
    assert not room.any(), "what lies around is not written"


def test_the_norm_of_nothing_is_nothing() -> None:
    assert not norm_frames(torch.zeros(_SHAPE), noise(6)).any()


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_sum_is_rounded_once(has_bias: bool) -> None:
    frames, residual = noise(*_SHAPE).bfloat16(), noise(*_SHAPE, seed=2).bfloat16()
    bias = noise(6, seed=3).bfloat16() if has_bias else None
    exact = frames.double() + residual.double() + (0 if bias is None else per_channel(bias))
    assert torch.equal(sum_frames(frames, residual, bias=bias), exact.bfloat16())


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [_SHAPE, (2, 6, 4, 5)])
def test_the_norm_by_groups_is_its_formula_with_moments_found_or_given(
    shape: tuple[int, ...], has_bias: bool, silu: bool
) -> None:
    frames, weight, offset = noise(*shape), noise(6, seed=2), noise(6, seed=3)
    bias = noise(6, seed=4) if has_bias else None
    alike = (1,) * (len(shape) - 2)
    exact = frames.double() + (0 if bias is None else bias.double().view(-1, *alike))
    grouped = exact.unflatten(1, (2, 3)).flatten(2)
    variance, mean = grouped.var(dim=-1, correction=0), grouped.mean(dim=-1)
    found = group_moments(frames, 2, bias=bias)
    torch.testing.assert_close(found, Moments(variance.float(), mean.float()), **FP32)
    options = {"eps": 1e-3, "bias": bias, "silu": silu}
    for moments, (used_variance, used_mean) in (
        (None, (variance, mean)),
        (found, (variance, mean)),
        (Moments(found.variance + 1, found.mean - 1), (variance + 1, mean - 1)),
    ):
        normed = (grouped - used_mean[..., None]) / (used_variance[..., None] + 1e-3).sqrt()
        expected = normed.view(shape) * weight.double().view(-1, *alike) + offset.double().view(-1, *alike)
        expected = expected * expected.sigmoid() if silu else expected
        result = norm_groups(frames, weight, offset, 2, moments=moments, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(result.double(), expected, **FP32)
        room = torch.zeros(shape)
        assert norm_groups(frames, weight, offset, 2, moments=moments, out=room, **options) is room  # type: ignore[arg-type]
        assert torch.equal(room, result)


def test_the_norm_by_groups_rounds_once() -> None:
    frames, weight, offset = noise(*_SHAPE).bfloat16(), noise(6, seed=2).bfloat16(), noise(6, seed=3).bfloat16()
    exact = F.silu(F.group_norm(frames.double(), 2, weight.double(), offset.double(), 1e-3))
    for moments in (None, group_moments(frames, 2)):
        found = norm_groups(frames, weight, offset, 2, eps=1e-3, moments=moments)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_sum_tells_its_moments_or_leaves_them_to_the_norm() -> None:
    frames, residual, bias = noise(*_SHAPE), noise(*_SHAPE, seed=2), noise(6, seed=3)
    found, moments = sum_with_moments(frames, residual, 2, bias=bias)
    assert torch.equal(found, sum_frames(frames, residual, bias=bias)) and moments is None


def test_frames_repeat_where_they_are_asked_to() -> None:
    alone, later = noise(2, 6, 1, 4, 5), noise(2, 6, 3, 4, 5, seed=2)
    found = upsample_frames([Footage(alone), Footage(later, repeats=2)])
    frames = torch.cat((alone, later.repeat_interleave(2, dim=2)), dim=2)
    assert torch.equal(found, frames.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4))


def test_upsampling_repeats_cells_and_unfolds_frames_that_share_them() -> None:
    alone, pairs, bias = noise(2, 6, 1, 4, 5), noise(2, 12, 3, 4, 5, seed=2), noise(12, seed=3)
    found = upsample_frames([Footage(alone), Footage(pairs, 2, bias)])
    assert found.shape == (2, 6, 7, 8, 10)
    added = pairs + bias.view(-1, 1, 1, 1)
    for frame in range(7):
        expected = alone[:, :, 0] if frame == 0 else added[:, :, (frame - 1) // 2].chunk(2, dim=1)[(frame - 1) % 2]
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert torch.equal(found[:, :, frame, row::2, column::2], expected)


@pytest.mark.parametrize("has_residual", [False, True])
def test_channels_spread_over_frames_lines_and_columns(has_residual: bool) -> None:
    frames, bias = noise(2, 32, 3, 4, 5), noise(32, seed=2)
    residual = noise(2, 16, 3, 4, 5, seed=3) if has_residual else None
    found = spread_frames(frames, bias=bias, residual=residual)
    assert found.shape == (2, 4, 5, 8, 10)
    for channel, (frame, row, column) in product(range(4), product(range(2), repeat=3)):
        part = 4 * frame + 2 * row + column
        expected = frames[:, 8 * channel + part] + bias[8 * channel + part]
        if residual is not None:
            expected = expected + residual[:, 8 * (channel % 2) + part]
        spread = found[:, channel, 1 - frame :: 2, row::2, column::2]
        assert torch.equal(spread, expected[:, 1 - frame :]), "of the first two frames only the later one is there"


def test_cells_are_evenly_spaced_or_not() -> None:
    cells = torch.empty(2, 3, 4, 5, 6)
    assert cell_step(cells) == 6
    assert cell_step(cells[:, 1:]) == 6, "samples may lie apart"
    assert cell_step(cells[..., :4]) == 6, "some of the channels"
    assert cell_step(cells[:, :, :, :4]) is None, "part of each line"
    assert cell_step(cells[..., :1].movedim(-1, 1).movedim(1, -1)) == 6
    assert cell_step(cells.movedim(-1, 1).movedim(2, -1)) is None, "channels do not lie side by side"
    assert cell_step(torch.empty(1, 1, 1, 1, 6)) == 6
    assert cell_step(torch.empty(2, 1, 4, 1, 6)[..., :2]) == 6, "a picture of one column"
