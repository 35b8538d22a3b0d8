"""Architecture of the Qwen-Image autoencoder, as published in `vae/config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sglang.multimodal_gen.configs.models.vaes.wan import WanVAEConfig
from sglang.multimodal_gen.errors import InvalidRequest

_CHANNELS = "input_channels"


@dataclass(frozen=True, kw_only=True)
class QwenImageVAEConfig(WanVAEConfig):
    """Wan 2.1's video autoencoder with a decoder trained on pictures. Source: arXiv:2508.02324.

    Its file counts the channels of encoder and decoder once, as `input_channels`, and has no options of Wan 2.2.
    """

    fields_of_file: ClassVar[frozenset[str]] = frozenset(
        {
            *("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample"),
            *("dropout", "latents_mean", "latents_std"),
        }
    )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        values = {key: value for key, value in data.items() if not key.startswith("_")}
        channels = values.pop(_CHANNELS, 3)
        for key in values:
            if key not in cls.fields_of_file:
                names = ", ".join(sorted({*cls.fields_of_file, _CHANNELS}))
                raise InvalidRequest(f"{cls.__name__} has no field {key!r}; it has {names}", param=key)
        return super().from_dict({**values, "in_channels": channels, "out_channels": channels})
