"""What goes wrong with pictures, masks and clips that requests bring."""

from __future__ import annotations

from sglang.multimodal_gen.errors import InvalidRequest


class InvalidImage(InvalidRequest):
    """An input image that cannot be read, or whose form or size is not accepted."""

    code = "invalid_image"


class ImageTooLarge(InvalidRequest):
    """An input image's file has too many bytes."""

    code = "image_too_large"
    http_status = 413


class TooManyPixels(InvalidRequest):
    """Input images with more pixels than are decoded; their headers say so, nothing was decoded."""

    code = "image_too_many_pixels"


class TooManyImages(InvalidRequest):
    """More input images than the call or the model takes."""

    code = "too_many_images"


class InvalidMask(InvalidRequest):
    """A mask that cannot be read or does not fit the image that it is for."""

    code = "invalid_mask"


class InvalidVideo(InvalidRequest):
    """An input video that cannot be read, or whose form or size is not accepted."""

    code = "invalid_video"


class VideoTooLarge(InvalidRequest):
    """An input video's file has too many bytes."""

    code = "video_too_large"
    http_status = 413


class VideoTooLong(InvalidRequest):
    """An input video with more frames, or more pixels in all its frames, than are decoded."""

    code = "video_too_long"


class UrlNotAllowed(InvalidRequest):
    """An input named by an address that the server would have to fetch."""

    code = "url_not_allowed"

    def __init__(self, param: str) -> None:
        super().__init__(
            f"{param}: the server fetches nothing, accepted is an uploaded file or a data URL with its bytes in base64",
            param=param,
        )
