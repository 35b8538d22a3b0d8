"""UMT5's text encoder: T5's, with a bias by distance in every block. Source: arXiv:2304.09151."""

from __future__ import annotations

from typing import ClassVar

from sglang.multimodal_gen.runtime.models.encoders.t5 import T5EncoderModel


class UMT5EncoderModel(T5EncoderModel):
    """Token ids to hidden states; takes a UMT5EncoderConfig."""

    bias_in_every_block: ClassVar[bool] = True
