"""Serving of image and video diffusion models.

Importing this package loads nothing else; `DiffGenerator` and `SamplingParams` load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator

    __version__: str

__all__ = ["DiffGenerator", "SamplingParams", "__version__"]

_DISTRIBUTION = "sglang-diffusion"
_LAZY = {
    "DiffGenerator": "sglang.multimodal_gen.runtime.entrypoints.diffusion_generator",
    "SamplingParams": "sglang.multimodal_gen.configs.sample.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version  # late: costs more than the rest of this import

        try:
            value: Any = version(_DISTRIBUTION)
        except PackageNotFoundError:  # a source tree on the path, not installed
            value = "0+source"
    elif name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
