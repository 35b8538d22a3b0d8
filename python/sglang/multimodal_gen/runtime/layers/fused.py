"""What surrounds the matrix products of a transformer block, each in one pass over the tokens where a kernel serves.

On a GPU with Triton these are kernels of `triton_kernels`; elsewhere, and under a compiler that fuses by itself, the
references below, which say what is computed. Both compute in fp32 and return the dtype that came in.

Shapes: B samples, S tokens, D hidden_size, H heads, E head_dim, G groups of neighbouring tokens that share a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.runtime.layers.gemm_choice import chosen_product, usual_product
from sglang.multimodal_gen.runtime.layers.quantization.products import (
    SCALE_NAME,
    Matrix,
    Quantization,
    multiply,
    multiply_into,
)
from sglang.multimodal_gen.runtime.layers.rotary import apply_rotary_emb


@cache
def _kernels() -> Any:
    """The module with the kernels; None where Triton is not installed."""
    try:
        from sglang.multimodal_gen.runtime.layers import triton_kernels  # late: it imports Triton
    except ImportError:
        return None
    return triton_kernels


def _serves(tensor: Tensor) -> bool:
    """Kernels have no gradients, and a compiler fuses by itself."""
    inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return tensor.is_cuda and inference and _kernels() is not None


def sum_norm(
    residual: Tensor,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    one_plus: bool = True,
    rms: bool = False,
    norm_update: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """residual + gate · update, and the norm of that times (1 + scale), or times `scale`, plus shift.

    Tokens [B, S, D]; gate, scale and shift [B or 1, G, D] or [D]. What is None is left out. The norm is layer norm or,
    with `rms`, by the root mean square. With `norm_update` the update is normed by its root mean square first.
    """
    if _serves(residual):
        found: tuple[Tensor, Tensor] = _kernels().sum_norm(
            residual,
            update,
            gate,
            scale,
            shift,
            eps=eps,
            one_plus=one_plus,
            norm=True,
            rms=rms,
            norm_update=norm_update,
        )
        return found
    summed = residual if update is None else gated_sum(residual, update, gate, norm_update=norm_update, eps=eps)
    wide, shape = summed.float(), summed.shape[-1:]
    if not rms and not one_plus and scale is not None and scale.ndim == 1:
        bias = None if shift is None else shift.float()
        return summed, F.layer_norm(wide, shape, scale.float(), bias, eps).to(residual.dtype)
    normed = F.rms_norm(wide, shape, eps=eps) if rms else F.layer_norm(wide, shape, eps=eps)
    return summed, _affine(normed, scale, shift, one_plus=one_plus).to(residual.dtype)


def gated_sum(
    residual: Tensor, update: Tensor, gate: Tensor | None, *, norm_update: bool = False, eps: float = 1e-6
) -> Tensor:
    """residual + gate · update, [B, S, D] each, the gate [B or 1, G, D] or [D]; one that is None is one. With
    `norm_update` the update is normed by its root mean square first."""
    if _serves(residual):
        summed: Tensor
        summed, _ = _kernels().sum_norm(
            residual, update, gate, None, None, eps=eps, one_plus=False, norm=False, norm_update=norm_update
        )
        return summed
    if norm_update:
        update = F.rms_norm(update.float(), update.shape[-1:], eps=eps)
    if gate is None:
        return (residual + update).to(residual.dtype)
    gates = gate.view(1, 1, -1) if gate.ndim == 1 else gate
    groups = gates.shape[1]
    summed = torch.addcmul(_grouped(residual.float(), groups), _grouped(update.float(), groups), gates.unsqueeze(2))
    return summed.flatten(1, 2).to(residual.dtype)


def norm_rotate(
    heads: Tensor,
    weight: Tensor | None,
    freqs_cis: Tensor | None,
    *,
    eps: float = 0.0,
    wide: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Queries or keys [B, S, H, E] -> the same shape, in `out` where given, which may be `heads`: root-mean-square norm
    of each head with `weight` [E] (`wide`: of all heads together, [H·E]), then the rotation by the table [1 or B, S, 1
    or H, E/2, 2]."""
    if _serves(heads):
        target = torch.empty_like(heads, memory_format=torch.contiguous_format) if out is None else out
        weights = None if weight is None else (weight,)
        _kernels().norm_rotate((heads,), weights, freqs_cis, (target,), eps=eps, wide=wide)
        return target
    if weight is not None:
        features = heads.flatten(2) if wide else heads
        # The fused kernel accumulates in fp32 for half-precision input.
        heads = F.rms_norm(features, weight.shape, weight.to(heads.dtype), eps).view_as(heads)
    if freqs_cis is not None:
        heads = apply_rotary_emb(heads, freqs_cis)
    return heads if out is None else out.copy_(heads)


def norm_rotate_both(
    query: Tensor,
    key: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    freqs_cis: Tensor | None,
    *,
    eps: float = 0.0,
    wide: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm_rotate` of queries and of keys of one shape, which share the table."""
    alike = query.stride() == key.stride() and (out is None or out[0].stride() == out[1].stride())
    if alike and _serves(query):
        targets = out or (query.new_empty(query.shape), key.new_empty(key.shape))
        _kernels().norm_rotate((query, key), weights, freqs_cis, targets, eps=eps, wide=wide)
        return targets
    of_query, of_key = (None, None) if weights is None else weights
    to_query, to_key = (None, None) if out is None else out
    return (
        norm_rotate(query, of_query, freqs_cis, eps=eps, wide=wide, out=to_query),
        norm_rotate(key, of_key, freqs_cis, eps=eps, wide=wide, out=to_key),
    )


def _affine(normed: Tensor, scale: Tensor | None, shift: Tensor | None, *, one_plus: bool) -> Tensor:
    if scale is None:
        if shift is None or shift.ndim == 1:
            return normed if shift is None else normed + shift.float()
        return (_grouped(normed, shift.shape[1]) + shift.float().unsqueeze(2)).flatten(1, 2)
    factor = 1 + scale.float() if one_plus else scale.float()
    if factor.ndim == 1:
        return normed * factor if shift is None else torch.addcmul(shift.float(), normed, factor)
    tokens, factor = _grouped(normed, factor.shape[1]), factor.unsqueeze(2)
    scaled = tokens * factor if shift is None else torch.addcmul(shift.float().unsqueeze(2), tokens, factor)
    return scaled.flatten(1, 2)


def _grouped(tokens: Tensor, num_groups: int) -> Tensor:
    """[B, S, D] -> [B, G, S/G, D], a view."""
    return tokens.unflatten(1, (num_groups, -1))


def linear_gelu(hidden_states: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """GELU, by its tanh form, of a linear layer: [..., I] -> [..., O]; on a GPU in the epilogue of the product, which
    those in fp8 do not have."""
    if not isinstance(weight, Tensor):
        return F.gelu(weight.linear(hidden_states, bias=bias), approximate="tanh")
    if _serves(hidden_states) and bias is not None and hidden_states.dtype != torch.float32:
        product = chosen_product(hidden_states, weight, bias, gelu=True)
        if product is not None:
            return product
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return usual_product(flat, weight, bias, gelu=True).view(*hidden_states.shape[:-1], -1)
    return F.gelu(F.linear(hidden_states, weight, bias), approximate="tanh")


def gated_silu(gate: Tensor, value: Tensor) -> Tensor:
    """SiLU(gate) · value, [..., D] each."""
    if _serves(gate):
        product: Tensor = _kernels().gated_silu(gate, value)
        return product
    return F.silu(gate) * value


class JoinedLinear:
    """Linear layers over the same input as one product. Their weights become views of one, and stay theirs."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.quantization = _quantization_of(layers[0])
        self.scales = None if self.quantization is None else _joined_scales(layers)
        self.weight = _joined([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers)), "all of the layers have a bias, or none"
        self.bias = _joined(biases) if biases else None

    @classmethod
    def of(cls, layers: Sequence[nn.Linear]) -> JoinedLinear | None:
        """Those of these layers; None where some are quantised and others not, or in other ways."""
        kinds = {(layer.weight.dtype, _quantization_of(layer)) for layer in layers}
        return cls(layers) if len(kinds) == 1 else None

    @property
    def is_plain(self) -> bool:
        """Whether the product is of one weight as it is, to which no layer's adapters add."""
        return self.quantization is None and not any(getattr(layer, "adapters", None) for layer in self.layers)

    def into(self, hidden_states: Tensor, out: Tensor) -> None:
        """[N, I] -> all outputs side by side, [N, O of all]; of one that `is_plain`."""
        multiply_into(hidden_states, self.weight, self.bias, out)

    @property
    def matrix(self) -> Matrix:
        """All of the weights as products take them."""
        if self.quantization is None or self.scales is None:
            return self.weight
        return self.quantization.matrix(self.weight, self.scales)

    def held_tensors(self) -> Iterator[Tensor]:
        """See TensorHolder."""
        yield from (tensor for tensor in (self.weight, self.scales, self.bias) if tensor is not None)

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """[..., I] -> each layer's output [..., O], a view."""
        parts: tuple[Tensor, ...] = multiply(hidden_states, self.matrix, self.bias).split(self.sizes, dim=-1)
        tables = [getattr(layer, "adapters", None) for layer in self.layers]
        if not any(tables):
            return parts
        return tuple(
            part if table is None else table.add(part, hidden_states) for part, table in zip(parts, tables, strict=True)
        )


def _quantization_of(layer: nn.Linear) -> Quantization | None:
    return getattr(layer, "quantization", None)


def _joined_scales(layers: Sequence[nn.Linear]) -> Tensor:
    """[O of all, 1]; one of a whole weight is that of each of its rows."""
    scales = [layer.get_parameter(SCALE_NAME).detach() for layer in layers]
    return torch.cat([own.expand(layer.out_features, 1) for own, layer in zip(scales, layers, strict=True)])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    # Not every device joins eight-bit floats; bytes are joined everywhere.
    as_bytes = [part.detach().view(torch.uint8) if part.itemsize == 1 else part.detach() for part in parts]
    joined = torch.cat(as_bytes).view(parts[0].dtype)
    for part, own in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = own
    return joined


def join_projections(model: nn.Module) -> None:
    """Once a model has its weights: let every layer that has a method of this name make one product of several."""
    for module in model.modules():
        join = getattr(module, "join_projections", None)
        if join is not None:
            join()
