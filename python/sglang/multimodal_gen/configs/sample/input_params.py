"""What a generation starts from besides its prompt: images, a mask, a video, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.declare import FROM_MODEL, LOCAL_ONLY, arg

INPUT_FILES = ("image_path", "mask_path", "last_image_path", "video_path")
MAX_AREA = 16384 * 16384


@dataclass(frozen=True, kw_only=True)
class InputParams:
    """Files are read where the request is made: workers see decoded pixels, results record no path."""

    image_path: str | tuple[str, ...] | None = arg(
        None,
        help="Image to start from or to edit: PNG, JPEG, WebP or BMP. Several where the model takes several. In Python "
        "also a PIL image or a uint8 array [H, W, 3].",
        group="inputs",
        unset="no image",
        exposed=LOCAL_ONLY,
        metavar="FILE",
    )
    mask_path: str | None = arg(
        None,
        help="Image of the first image's size that is white where that one is made anew and black where it stays.",
        group="inputs",
        unset="no mask",
        exposed=LOCAL_ONLY,
        metavar="FILE",
    )
    last_image_path: str | None = arg(
        None,
        help="Image that the video ends with.",
        group="inputs",
        unset="no image",
        exposed=LOCAL_ONLY,
        metavar="FILE",
    )
    video_path: str | None = arg(
        None,
        help="Video to start from: MP4, WebM or GIF. In Python also a list of frames or a uint8 array [T, H, W, 3].",
        group="inputs",
        unset="no video",
        exposed=LOCAL_ONLY,
        metavar="FILE",
    )
    strength: float | None = arg(
        None,
        help="How far the image or the video is changed; 1 starts from pure noise.",
        group="inputs",
        unset=FROM_MODEL,
        minimum=0.001,
        maximum=1.0,
        recorded=True,
    )
    image_cond_noise_scale: float | None = arg(
        None,
        help="Noise that is added to the image before the model sees it.",
        group="inputs",
        unset=FROM_MODEL,
        minimum=0.0,
        maximum=1.0,
        recorded=True,
    )
    frame_index: int | None = arg(
        None,
        help="Frame of the clip that the image shows, or that the video begins at.",
        group="inputs",
        unset=FROM_MODEL,
        minimum=0,
        maximum=100_000,
        recorded=True,
    )
    denoise_strength: float | None = arg(
        None,
        help="Share of the steps that are taken; the first ones, at high noise, are left out.",
        group="inputs",
        unset=FROM_MODEL,
        minimum=0.001,
        maximum=1.0,
        recorded=True,
    )
    image_embed_interleave: int | None = arg(
        None,
        help="Of the image's tokens that the text encoder gives one in so many is kept.",
        group="inputs",
        unset=FROM_MODEL,
        minimum=1,
        maximum=5,
        recorded=True,
    )
    auto_resize: bool | None = arg(
        None,
        help="Whether the image is first brought to the nearest size that the model was trained on.",
        group="inputs",
        unset=FROM_MODEL,
        recorded=True,
    )
    max_area: int | None = arg(
        None,
        help="Pixels of a result whose size follows from the image, or of models that make one area at any aspect "
        "ratio.",
        group="inputs",
        unset=FROM_MODEL,
        minimum=256,
        maximum=MAX_AREA,
        recorded=True,
    )
