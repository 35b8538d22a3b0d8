"""Runs the Triton kernels with Triton's interpreter on the CPU and prints how far each is from its reference, as JSON.

A program of its own, because Triton reads TRITON_INTERPRET when it is imported. It is started with whose kernels to
run: `tokens frames groups` by `test_fused.py`, `rows` by `test_quantization.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.multimodal_gen.configs.models.vaes.autoencoder_kl import AutoencoderKLConfig
from sglang.multimodal_gen.runtime.layers import (
    fused,
    fused_frames,
    triton_frame_kernels,
    triton_kernels,
    triton_quantization,
)
from sglang.multimodal_gen.runtime.layers.quantization.rows import QuantizedRows, reference_rows
from sglang.multimodal_gen.runtime.models.vaes import autoencoder_kl_blocks
from sglang.multimodal_gen.runtime.models.vaes.autoencoder_kl import AutoencoderKL
from sglang.multimodal_gen.test.tiny_parts import tiny_picture_vae

# The interpreter is slow: each precision has a width, neither of them a power of two.
DTYPES = {"fp32": (torch.float32, 40), "bf16": (torch.bfloat16, 72)}
# Frames in front, and lines around.
ROOMS = ((0, 0), (2, 0), (2, 1))


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape).to(dtype)


def distance(found: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the reference's number, or to their root mean square where that is larger.
    Whatever is no number is far away."""
    assert (found.shape, found.dtype) == (reference.shape, reference.dtype)
    exact = reference.double()
    difference = (found.double() - exact).abs() / torch.maximum(exact.abs(), exact.square().mean().sqrt())
    return float(difference.nan_to_num(nan=torch.inf).max())


def tokens_and_groups() -> Iterator[tuple[int, int, int]]:
    """Batch, tokens, groups: one and several, of four, two and an odd number of tokens, and one for each token."""
    yield from ((2, 4, 1), (2, 8, 2), (1, 4, 2), (2, 6, 2), (2, 3, 3))


def sum_norms(dtype: torch.dtype, width: int) -> Iterator[tuple[str, float]]:
    """Of `sum_norm` and `gated_sum`: every part there or not, tokens and modulations as slices of wider tensors."""
    for batch, tokens, groups in tokens_and_groups():
        residual = drawn(batch, tokens + 3, width + 8, dtype=dtype)[:, 2 : 2 + tokens, :width]
        update = drawn(batch, tokens, 2 * width, dtype=dtype)[..., width:]
        gate, scale, shift = drawn(batch, groups, 3 * width).chunk(3, dim=-1)
        # The same values for every sample, or for every token.
        shared_gate, vectors = drawn(1, groups, width), (drawn(width), drawn(width))
        for name, given, parts, options in (
            ("norm alone", None, (None, None, None), {}),
            ("modulated", None, (None, scale, shift), {}),
            ("all", update, (gate, scale, shift), {}),
            ("all, by the root mean square", update, (gate, scale, shift), {"rms": True}),
            ("gate of every sample", update, (shared_gate, scale, shift), {}),
            ("weight and bias", update, (None, *vectors), {"one_plus": False}),
            ("weight, by the root mean square", update, (gate, vectors[0], None), {"one_plus": False, "rms": True}),
            ("shift alone", update, (gate, None, shift), {}),
            ("normed update", update, (gate, scale, None), {"one_plus": False, "rms": True, "norm_update": True}),
            ("normed update, a weight as gate", update, (vectors[0], scale, None), {"norm_update": True}),
        ):
            yield from of_sum_norm(f"{name} {batch, tokens, groups}", (residual, given), parts, options)
        for name, part, normed in (("gate", gate, False), ("no gate", None, False), ("weight", vectors[0], True)):
            found, untouched = triton_kernels.sum_norm(
                residual, update, part, None, None, eps=1e-6, one_plus=False, norm=False, norm_update=normed
            )
            assert untouched is residual
            reference = fused.gated_sum(residual, update, part, norm_update=normed)
            yield f"sum with {name} {batch, tokens, groups}", distance(found, reference)


def of_sum_norm(
    name: str,
    tokens: tuple[Tensor, Tensor | None],
    parts: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> Iterator[tuple[str, float]]:
    """Both results of one call."""
    (residual, update), (gate, scale, shift) = tokens, parts
    complete = {"one_plus": True, **options}
    found = triton_kernels.sum_norm(residual, update, gate, scale, shift, eps=1e-5, norm=True, **complete)
    reference = fused.sum_norm(residual, update, gate, scale=scale, shift=shift, eps=1e-5, **complete)
    assert (found[0] is residual) == (update is None)
    yield f"{name}: sum", distance(found[0], reference[0])
    yield f"{name}: norm", distance(found[1], reference[1])


def norm_rotations(dtype: torch.dtype, width: int) -> Iterator[tuple[str, float]]:
    """Of `norm_rotate`: heads from one product of three, into a part of a longer sequence."""
    batch, tokens = 2, 3
    for (heads, head_dim), wide in product(((4, 16), (3, width // 2)), (False, True)):
        inner = heads * head_dim
        source = drawn(batch, tokens, 3 * inner, dtype=dtype)[..., inner : 2 * inner].unflatten(-1, (heads, head_dim))
        weight = drawn(inner if wide else head_dim)
        tables = [drawn(by_batch, tokens, by_head, head_dim // 2, 2) for by_batch in (1, 2) for by_head in (1, heads)]
        longer = drawn(1, tokens + 4, 1, head_dim // 2, 2)[:, 3 : 3 + tokens]
        for norm, table in product((weight, None), (*tables, longer, None)):
            room = torch.full((batch, tokens + 3, heads, head_dim), torch.nan, dtype=dtype)
            target = room[:, 2 : 2 + tokens]
            weights = None if norm is None else (norm,)
            triton_kernels.norm_rotate((source,), weights, table, (target,), eps=1e-6, wide=wide)
            untouched = torch.cat((room[:, :2], room[:, 2 + tokens :]), dim=1)
            assert bool(untouched.isnan().all()), "what lies around the target stays"
            # In fp32 throughout, as the kernel computes: the reference would round in the middle.
            reference = fused.norm_rotate(source.float(), norm, table, eps=1e-6, wide=wide).to(dtype)
            has = f"{'norm' if norm is not None else 'no norm'}, table {None if table is None else tuple(table.shape)}"
            yield f"rotation {heads, head_dim}, wide {wide}, {has}", distance(target, reference)
            yield from rotations_of_both(norm, table, heads, head_dim, dtype=dtype, wide=wide, has=has)


def rotations_of_both(
    norm: Tensor | None, table: Tensor | None, heads: int, head_dim: int, *, dtype: torch.dtype, wide: bool, has: str
) -> Iterator[tuple[str, float]]:
    """Queries and keys of one product where they are, its values untouched."""
    batch, tokens = 2, 3
    product = drawn(batch, tokens, 3, heads, head_dim, dtype=dtype)
    before = product.clone()
    query, key, _ = product.unbind(2)
    weights = None if norm is None else (norm, drawn(*norm.shape))
    triton_kernels.norm_rotate((query, key), weights, table, (query, key), eps=1e-6, wide=wide)
    assert torch.equal(product[:, :, 2], before[:, :, 2]), "what is no part of them stays"
    for number, found in enumerate((query, key)):
        own = None if weights is None else weights[number]
        reference = fused.norm_rotate(before[:, :, number].float(), own, table, eps=1e-6, wide=wide).to(dtype)
        yield f"both rotated, {number}, {heads, head_dim}, wide {wide}, {has}", distance(found, reference)


def gated_silus(dtype: torch.dtype, width: int) -> Iterator[tuple[str, float]]:
    """Of `gated_silu`: apart, and as halves of one product; widths within a block of the kernel and beyond."""
    for tokens, features in product((1, 3, 5, 7, 8), (width, 16, 2048 + width, 3)):
        apart = drawn(2, tokens, features, dtype=dtype), drawn(2, tokens, features, dtype=dtype)
        halves = drawn(2, tokens, 2 * features, dtype=dtype).chunk(2, dim=-1)
        for name, (gate, value) in (("apart", apart), ("halves", halves)):
            reference = (fused.gated_silu(gate.float(), value.float())).to(dtype)
            yield f"gated {name} {tokens, features}", distance(triton_kernels.gated_silu(gate, value), reference)


def frame_norms(dtype: torch.dtype, width: int) -> Iterator[tuple[str, float]]:
    """Of `norm_frames` and `sum_frames`: into memory of its own, behind other frames, and between lines of others."""
    for channels, batch, size, extra in ((3, 1, (3, 4, 5), 0), (width, 2, (3, 4, 5), 16), (width, 1, (1, 1, 1), 0)):
        # Some of the channels of wider frames, in the second case.
        frames = clip(batch, channels + extra, *size, dtype=dtype)[:, :channels]
        residual, in_place = clip(batch, channels, *size, dtype=dtype), not extra
        weight = drawn(channels, dtype=dtype)
        for bias, silu, (lead, edge) in product((None, drawn(channels, dtype=dtype)), (True, False), ROOMS):
            longer = (size[0] + lead, size[1] + 2 * edge, size[2] + 2 * edge)
            room = torch.full_like(clip(batch, channels, *longer), torch.nan, dtype=dtype)
            inner = room[:, :, lead:, edge : edge + size[1], edge : edge + size[2]]
            triton_frame_kernels.norm_frames(
                frames.movedim(1, -1),
                weight,
                inner.movedim(1, -1),
                source_cell=channels + extra,
                bias=bias,
                silu=silu,
                eps=1e-24,
            )
            assert int((~room.isnan()).sum()) == inner.numel(), "what lies around stays"
            reference = fused_frames.norm_frames(frames, weight, bias=bias, silu=silu)
            case = f"{channels} channels, {batch, size}, silu {silu}, {lead} frames and {edge} lines around"
            yield f"norm of {case}, bias {bias is not None}", distance(inner, reference)
        yield from modulated_norms(frames, weight, channels + extra)
        for bias in (None, drawn(channels, dtype=dtype)):
            reference = fused_frames.sum_frames(frames, residual, bias=bias)
            cells, summed = frames.movedim(1, -1), torch.empty_like(residual).movedim(1, -1)
            triton_frame_kernels.norm_frames(
                cells,
                None,
                None,
                source_cell=channels + extra,
                bias=bias,
                residual=residual.movedim(1, -1),
                summed=cells if in_place else summed,
                eps=1e-24,
            )
            found = (cells if in_place else summed).movedim(-1, 1)
            yield f"sum of {channels, batch, size}, bias {bias is not None}", distance(found, reference)


def modulated_norms(frames: Tensor, weight: Tensor, source_cell: int) -> Iterator[tuple[str, float]]:
    """Of `norm_frames` with scale and shift of each sample, which lie in wider tensors, with and without a weight."""
    batch, channels = frames.shape[:2]
    scale, shift = drawn(batch, 4 * channels).chunk(4, dim=1)[1:3]
    for factor, modulation, eps in product((None, weight), (None, fused_frames.ScaleShift(scale, shift)), (1e-8, 0.5)):
        found = torch.empty_like(clip(*frames.shape), dtype=frames.dtype)
        cells = frames.movedim(1, -1), found.movedim(1, -1)
        triton_frame_kernels.norm_frames(
            cells[0], factor, cells[1], source_cell=source_cell, modulation=modulation, eps=eps
        )
        reference = fused_frames.norm_frames(frames, factor, modulation=modulation, eps=eps)
        case = f"{tuple(frames.shape)}, weight {factor is not None}, eps {eps}"
        yield f"modulation {modulation is not None} of {case}", distance(found, reference)


def upsamplings(dtype: torch.dtype, width: int) -> Iterator[tuple[str, float]]:
    """Of `upsample_frames`: frames alone, frames that share their cells, frames that repeat, and several of them."""
    for channels, batch, (length, height, line) in ((3, 1, (1, 1, 1)), (width, 1, (3, 2, 5)), (3, 2, (2, 3, 2))):
        alone = fused_frames.Footage(clip(batch, channels, 1, height, line, dtype=dtype))
        for shared, bias in product((1, 2, 3), (None, drawn(3 * channels, dtype=dtype))):
            frames = clip(batch, shared * channels, length, height, line, dtype=dtype)
            part = fused_frames.Footage(frames, shared, None if bias is None else bias[: shared * channels])
            for parts in ([part], [alone, part]):
                reference = fused_frames.upsample_frames(parts)
                found = fused_frames.upsampled_by(triton_frame_kernels, parts)
                case = f"{len(parts)} parts, {shared} of a frame, {channels, batch, length, height, line}"
                yield f"{case}, bias {bias is not None}", distance(found, reference)
        again = fused_frames.Footage(clip(batch, channels, length, height, line, dtype=dtype), repeats=2)
        for parts in ([again], [alone, again]):
            reference = fused_frames.upsample_frames(parts)
            found = fused_frames.upsampled_by(triton_frame_kernels, parts)
            yield f"{len(parts)} parts, repeated, {channels, batch, length}", distance(found, reference)


def group_norms(dtype: torch.dtype, width: int) -> Iterator[tuple[str, float]]:
    """Of `group_moments` and `norm_groups`: several tiles of cells for a program, several programs, a last one that is
    not full, groups of any number of channels, some of the channels of wider frames."""
    triton_frame_kernels._ENOUGH_PARTS = 3  # so that small inputs have programs of several tiles
    for channels, groups, batch, size, extra, mean in (
        (3, 1, 1, (3, 4, 5), 0, 0.0),
        (width, 8, 2, (3, 4, 5), 16, 0.0),
        (width, 4, 1, (1, 13, 31), 0, 1.0),
        (12, 4, 2, (1, 1, 1), 0, 1.0),
        (1100, 11, 1, (1, 3, 3), 0, 0.0),
    ):
        frames = (clip(batch, channels + extra, *size) + mean).to(dtype)[:, :channels]
        cells, step = frames.movedim(1, -1), channels + extra
        weight, offset = drawn(channels, dtype=dtype), drawn(channels, dtype=dtype)
        residual = clip(batch, channels, *size, dtype=dtype)
        case = f"{channels} channels, {groups} groups, {batch, size}"
        rooms = ROOMS if channels < width else ROOMS[::2]
        biases = (None, drawn(channels, dtype=dtype))
        found = [triton_frame_kernels.group_moments(cells, groups, source_cell=step, bias=bias) for bias in biases]
        for bias, moments in zip(biases, found, strict=True):
            yield from of_moments(f"{case}, bias {bias is not None}", moments, frames, groups, bias)
        activated = [(True, room) for room in rooms] + [(False, rooms[0])]
        for (bias, moments), (silu, (lead, edge)) in product(zip(biases, found, strict=True), activated):
            longer = (size[0] + lead, size[1] + 2 * edge, size[2] + 2 * edge)
            room = torch.full_like(clip(batch, channels, *longer), torch.nan, dtype=dtype)
            inner = room[:, :, lead:, edge : edge + size[1], edge : edge + size[2]]
            options: dict[str, Any] = {"bias": bias, "silu": silu, "eps": 1e-3}
            triton_frame_kernels.norm_groups(
                cells, weight, offset, moments, inner.movedim(1, -1), source_cell=step, **options
            )
            assert int((~room.isnan()).sum()) == inner.numel(), "what lies around stays"
            reference = fused_frames.norm_groups(frames, weight, offset, groups, **options)
            yield (
                f"norm of {case}, bias {bias is not None}, silu {silu}, {lead, edge} around",
                distance(inner, reference),
            )
        for bias in biases:
            expected = fused_frames.sum_frames(frames, residual, bias=bias)
            summed = cells.clone() if extra else cells
            moments = triton_frame_kernels.group_moments(
                cells, groups, source_cell=step, bias=bias, residual=residual.movedim(1, -1), summed=summed
            )
            yield f"sum of {case}, bias {bias is not None}", distance(summed.movedim(-1, 1), expected)
            yield from of_moments(f"sum of {case}, bias {bias is not None}", moments, expected, groups, None)


def far_moments(dtype: torch.dtype, width: int) -> Iterator[tuple[str, float]]:
    """Of `group_moments`, of numbers far from zero: sums of squares in fp32 would be 1e-3 of the variance away."""
    sizes = ((1, 1), (1, 1024), (7, 1), (7, 1024), (70, 5))
    for (channels, groups), (line, parts) in product(((3, 3), (width, 1), (width, 4)), sizes):
        frames = (clip(2, channels, 1, 31, line) + 100).to(dtype)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(triton_frame_kernels, "_ENOUGH_PARTS", parts)
            moments = triton_frame_kernels.group_moments(frames.movedim(1, -1), groups, source_cell=channels)
        yield from of_moments(f"{channels, groups, line}, {parts} programs", moments, frames, groups, None)


def picture_autoencoders(dtype: torch.dtype, width: int) -> Iterator[tuple[str, float]]:
    """A whole autoencoder with kernels around its convolutions, which leave their biases to them, and without; in fp32
    with attention in its middle."""
    changes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (12, 24),
        "norm_num_groups": 3,
        "mid_block_add_attention": dtype == torch.float32,
    }
    reference = tiny_picture_vae(0, **changes)
    ours = AutoencoderKL(AutoencoderKLConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict())
    inputs = drawn(2, 4, 1, 2, 3), drawn(1, 3, 1, 4, 6)
    exact = ours.decode(inputs[0]), ours.encode(inputs[1]).mean
    module, (latents, pictures) = ours.to(dtype), (tensor.to(dtype) for tensor in inputs)
    plain = module.decode(latents), module.encode(pictures).mean
    with pytest.MonkeyPatch.context() as patched:
        for place in (fused_frames, autoencoder_kl_blocks):
            patched.setattr(place, "serves", lambda _: True)
        patched.setattr(fused_frames, "_kernels", lambda: triton_frame_kernels)
        found = module.decode(latents), module.encode(pictures).mean
    for name, *three in zip(("decoder", "encoder"), found, plain, exact, strict=True):
        with_kernels, without, of_fp32 = three
        far, as_far = (float((each.float() - of_fp32).norm() / of_fp32.norm()) for each in (with_kernels, without))
        # In bf16 both are as far from what is exact; a bias that is lost is farther.
        yield name, far if dtype == torch.float32 else far - 1.25 * as_far


def of_moments(
    case: str, found: tuple[Tensor, Tensor], frames: Tensor, groups: int, bias: Tensor | None
) -> Iterator[tuple[str, float]]:
    """Against fp64; a mean is as exact as numbers of its size and of the spread around it can be."""
    exact = frames.double() if bias is None else frames.double() + bias.double().view(-1, 1, 1, 1)
    variance, mean = torch.var_mean(exact.unflatten(1, (groups, -1)).flatten(2), dim=-1, correction=0)
    yield f"variance of {case}", distance(found[0], variance.float())
    far = (found[1].double() - mean).abs() / (variance.sqrt() + mean.abs())
    yield f"mean of {case}", float(far.nan_to_num(nan=torch.inf).max())


def spreads(dtype: torch.dtype, width: int) -> Iterator[tuple[str, float]]:
    """Of `spread_frames`: one frame and several, with and without bias and a residual of all or some channels."""
    sizes = ((1, 1, 1), (3, 2, 5), (2, 3, 3))
    for (channels, batch), (length, height, line) in product(((6, 2), (width, 1)), sizes):
        frames = clip(batch, 8 * channels, length, height, line, dtype=dtype)
        for bias, repeats in product((None, drawn(8 * channels, dtype=dtype)), (0, 1, 2)):
            residual = None
            if repeats:
                residual = clip(batch, 8 * channels // repeats, length, height, line, dtype=dtype)
            found = fused_frames.spread_by(triton_frame_kernels, frames, bias=bias, residual=residual)
            reference = fused_frames.spread_frames(frames, bias=bias, residual=residual)
            case = f"{channels, batch, length, height, line}, bias {bias is not None}, {repeats} of the residual"
            yield f"spread of {case}", distance(found, reference)


def quantized_rows(dtype: torch.dtype, width: int) -> Iterator[tuple[str, float]]:
    """Of `quantize_rows`: slices of wider rows, zeros, large numbers, and parts side by side, with and without GELU."""
    for tokens, features in product((1, 3), (16, width, 200)):
        wide = drawn(tokens, features + 8, dtype=dtype)
        tiny, large = (torch.full((tokens, features), size, dtype=dtype) for size in (1e-30, 1e30))
        for name, parts in (
            ("contiguous", [wide[:, :features].contiguous()]),
            ("slice", [wide[:, 8:]]),
            ("zeros", [torch.zeros(tokens, features, dtype=dtype)]),
            ("tiny", [tiny]),
            ("large", [large]),
            ("two parts", [wide[:, 8:], 3 * wide[:, :16]]),
            ("three parts", [wide[:, :24], wide[:, 8:], 2 * wide[:, :16].contiguous()]),
        ):
            # A GPU takes the GELU of large numbers through an infinity, of which NumPy warns.
            for gelu_from in range(1 if name == "large" else 0, len(parts) + 1):
                found = QuantizedRows(*triton_quantization.quantize_rows(parts, gelu_from=gelu_from))
                reference = reference_rows(*parts, gelu_from=gelu_from)
                case = f"{name} {tokens, features}, GELU from {gelu_from}"
                slack = 0.0 if gelu_from == len(parts) else 1e-5  # GELU is written in another way
                far = distance(found.scales, reference.scales)
                yield f"scales of {case}", far if far > slack else 0.0
                wide = [part.float() for part in parts]
                wide[gelu_from:] = [F.gelu(part, approximate="tanh") for part in wide[gelu_from:]]
                exact = torch.cat(wide, dim=1) / found.scales
                same = same_fp8(found.values.float(), reference.values.float(), exact, slack=slack)
                yield f"values of {case}", 0.0 if same else torch.inf


def same_fp8(found: Tensor, reference: Tensor, exact: Tensor, *, slack: float) -> bool:
    """Whether values are equal, but for what this interpreter's casts to fp8 get wrong, which GPUs do not: it loses a
    carry into the exponent, cuts what is smaller than a normal number, and rounds a number in the middle up. `slack`:
    how far from the middle a number still may go either way, as a part of it."""
    middle = ((found - exact).abs() - (reference - exact).abs()).abs() <= slack * exact.abs()
    halved = (reference.abs().frexp().mantissa == 0.5) & (found == reference / 2)
    cut = (reference.abs() <= 2**-6) & ((found - reference).abs() <= 2**-9)
    return bool(((found == reference) | halved | cut | middle).all())


def clip(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers [B, C, T, H, W] in channels-last order."""
    return drawn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)


def main() -> None:
    """Print the largest distance of each kernel and precision, with the case that it is of, and how many there were."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    worst = {}
    kernels = {
        "tokens": (sum_norms, norm_rotations, gated_silus),
        "frames": (frame_norms, spreads, upsamplings),
        "groups": (far_moments, group_norms, picture_autoencoders),
        "rows": (quantized_rows,),
    }
    chosen = [cases for operands in sys.argv[1:] for cases in kernels[operands]]
    for (name, drawn_as), cases in product(DTYPES.items(), chosen):
        found = list(cases(*drawn_as))
        case, far = max(found, key=lambda each: each[1])
        worst[f"{cases.__name__} {name}"] = {"cases": len(found), "worst": case, "distance": far}
    sys.stdout.write(json.dumps(worst))


if __name__ == "__main__":
    main()
