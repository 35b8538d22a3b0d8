"""A tiny checkpoint of each native family, and what a request to it may say beside its size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang.multimodal_gen.test.tiny_flux import TINY_FLUXES, save_tiny_flux
from sglang.multimodal_gen.test.tiny_hunyuan_video import TINY_HUNYUAN_VIDEOS, save_tiny_hunyuan_video
from sglang.multimodal_gen.test.tiny_ltx import TINY_LTXS, save_tiny_ltx
from sglang.multimodal_gen.test.tiny_qwen_image import TINY_QWEN_IMAGES, save_tiny_qwen_image
from sglang.multimodal_gen.test.tiny_sd3 import TINY_SD3S, save_tiny_sd3
from sglang.multimodal_gen.test.tiny_wan_image import TINY_WAN_IMAGES, save_tiny_wan_image
from sglang.multimodal_gen.test.tiny_zimage import TINY_Z_IMAGES, save_tiny_zimage

_CFG = {"guidance_scale": 4.0, "negative_prompt": "green"}
_TRUE_CFG = {"true_cfg_scale": 4.0, "negative_prompt": "green"}
_SKIPPED_LAYERS = {"skip_guidance_layers": [0, 2], "skip_layer_guidance_stop": 0.9}
FAMILIES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "wan": (lambda path: save_tiny_wan_image(path, TINY_WAN_IMAGES["t2v_experts"]), _CFG | {"num_frames": 9}),
    "flux": (lambda path: save_tiny_flux(path, TINY_FLUXES["dev"]), {}),
    "qwen": (lambda path: save_tiny_qwen_image(path, TINY_QWEN_IMAGES["plain"]), _TRUE_CFG),
    "hunyuan": (lambda path: save_tiny_hunyuan_video(path, TINY_HUNYUAN_VIDEOS["t2v"]), _TRUE_CFG | {"num_frames": 9}),
    "ltx": (lambda path: save_tiny_ltx(path, TINY_LTXS["timed"]), _CFG | {"num_frames": 9}),
    "zimage": (lambda path: save_tiny_zimage(path, TINY_Z_IMAGES["base"]), _CFG),
    "sd3": (lambda path: save_tiny_sd3(path, TINY_SD3S["dual"]), _CFG | _SKIPPED_LAYERS),
}


def wish_of(family: str, **values: Any) -> dict[str, Any]:
    """A small request."""
    base = {"width": 64, "height": 64, "max_sequence_length": 16, "num_inference_steps": 4, "prompt": "a", "seed": 1}
    return base | FAMILIES[family][1] | values
