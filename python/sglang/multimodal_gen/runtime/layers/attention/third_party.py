"""Attention kernels of packages that are installed by choice; each is imported when its kernel is built.

Shapes: B batch, S query tokens, L key tokens, H heads, E head_dim.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sglang.multimodal_gen.runtime.layers.attention.traits import KernelTraits


class FlashAttention:
    """One major version of FlashAttention. Source: https://github.com/Dao-AILab/flash-attention

    What differs between the versions is a class below; what they share is the function `flash_attn_func` on
    [B, S, H, E] tensors, which returns a tuple when it also gives the log-sum-exp, and in some releases always.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    package: ClassVar[str]
    lse_switch: ClassVar[str]
    """The argument that asks for the log-sum-exp, where a release has one."""

    def __init__(self) -> None:
        """Raises ImportError with a phrase that follows the kernel's name."""
        self._attend = self.function()
        accepted = inspect.signature(self._attend).parameters
        self._with_lse = {self.lse_switch: True} if self.lse_switch in accepted else {}

    @classmethod
    def function(cls) -> Callable[..., Any]:
        """`flash_attn_func`, or what does the same. Raises ImportError with a phrase that follows the kernel's name."""
        return import_function(cls.modules, "flash_attn_func", package=cls.package)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `AttentionKernel`."""
        result = self._attend(query, key, value, softmax_scale=scale)
        return result[0] if isinstance(result, tuple) else result

    def with_lse(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """See `LseKernel`."""
        out, lse, *_ = self._attend(query, key, value, softmax_scale=scale, **self._with_lse)
        assert lse is not None, f"this release of {self.package} gives no log-sum-exp"
        return out, lse


class FlashAttention2(FlashAttention):
    """For GPUs since Ampere. Source: arXiv:2307.08691"""

    name = "fa2"
    # Not `flash_attn`: with FlashAttention 4 alone that is an empty namespace.
    modules = ("flash_attn.flash_attn_interface",)
    package = "flash-attn"
    lse_switch = "return_attn_probs"
    traits: ClassVar[KernelTraits] = KernelTraits(
        precisions=("bf16", "fp16"),
        device_types=("cuda",),
        min_capability=(8, 0),
        head_multiple=8,
        max_head_size=256,
        gives_lse=True,
    )


class FlashAttention3(FlashAttention):
    """For Hopper. Source: arXiv:2407.08608

    Upstream's build has both half precisions, but the `fa3-fwd` wheel only bf16, so only that is promised.
    """

    name = "fa3"
    modules = ("flash_attn_interface", "fa3_fwd_interface")
    package = "fa3-fwd"
    lse_switch = "return_attn_probs"
    traits: ClassVar[KernelTraits] = KernelTraits(
        precisions=("bf16",),
        device_types=("cuda",),
        min_capability=(9, 0),
        capability_majors=(9,),
        head_multiple=8,
        max_head_size=256,
        gives_lse=True,
    )
    _OPERATORS: ClassVar[Mapping[str, str]] = {"flash_attn_interface": "flash_attn_3", "fa3_fwd_interface": "fa3_fwd"}
    """Under which name each module registers its operators."""

    @classmethod
    def function(cls) -> Callable[..., Any]:
        """The operator that `flash_attn_func` calls, where it has the arguments that are given to it here.

        Packages wrap it for training and for torch's compiler, which the first call would import: more than 1 s.
        """
        function = super().function()
        operators = getattr(torch.ops, cls._OPERATORS.get(function.__module__, ""), None)
        operator = getattr(getattr(operators, "fwd", None), "default", None)
        return function if operator is None else _by_operator(operator) or function


def _by_operator(operator: Any) -> Callable[..., Any] | None:
    """None of one whose arguments are others than those of upstream's."""
    arguments = {argument.name: argument.has_default_value() for argument in operator._schema.arguments}
    needed = {name for name, has_default in arguments.items() if not has_default}
    given = {"softmax_scale", "q_descale", "k_descale", "v_descale", "num_splits"}
    if needed != {"q", "k", "v"} or not given <= arguments.keys():
        return None

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        # Not split, as the package does not split either: that would add up in another order.
        out, lse, *_ = operator(
            *(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v)),
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=softmax_scale,
            num_splits=1,
        )
        return out, lse

    return attend


class FlashAttention4(FlashAttention):
    """For Hopper and data-centre Blackwell, compiled at the first call. The head sizes are those of every release."""

    name = "fa4"
    modules = ("flash_attn.cute",)
    package = "flash-attn-4"
    lse_switch = "return_lse"
    traits: ClassVar[KernelTraits] = KernelTraits(
        precisions=("bf16", "fp16"),
        device_types=("cuda",),
        min_capability=(9, 0),
        capability_majors=(9, 10, 11),
        head_sizes=(64, 96, 128),
        gives_lse=True,
    )


class SageAttention:
    """Queries and keys in 8 bits: faster, and not exact. Source: arXiv:2410.02367, arXiv:2411.10958

    Release 1 of the package gives no log-sum-exp, so none is promised.
    """

    name: str = "sage_attn"
    package: ClassVar[str] = "sageattention"
    traits: ClassVar[KernelTraits] = KernelTraits(
        precisions=("bf16", "fp16"),
        device_types=("cuda",),
        min_capability=(8, 0),
        capability_majors=(8, 9, 12),
        head_sizes=(64, 96, 128),
        lossy=True,
    )

    def __init__(self) -> None:
        """Raises ImportError with a phrase that follows the kernel's name."""
        self._attend = import_function(("sageattention",), "sageattn", package=self.package)
        # Release 1, known by what it cannot return, subtracts the keys' mean in place.
        self._writes_keys = "return_lse" not in inspect.signature(self._attend).parameters

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See `AttentionKernel`."""
        if self._writes_keys:
            key = key.clone()
        attended: Tensor = self._attend(query, key, value, tensor_layout="NHD", sm_scale=scale)
        return attended


def import_function(modules: Sequence[str], function: str, *, package: str) -> Callable[..., Any]:
    """`function` of the first of `modules` that is installed.

    Raises: ImportError saying, in a phrase that follows a kernel's name, that none is or why one does not load.
    """
    for name in modules:
        try:
            return getattr(importlib.import_module(name), function)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ImportError(f"is installed without {error.name}, which it needs") from error
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            # Compiled packages meet the wrong torch or CUDA in all of these ways.
            text = " ".join(str(error).split())
            raise ImportError(f"is installed but does not load ({text})") from error
    raise ImportError(f"is not installed (the package is {package})")
