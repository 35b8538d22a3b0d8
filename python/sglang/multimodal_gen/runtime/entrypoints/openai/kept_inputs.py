"""What durable jobs start from: decoded pictures and clips, a file for each job, for when the job begins again."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from sglang.multimodal_gen.errors import StorageError
from sglang.multimodal_gen.runtime.entrypoints.media_inputs import Clip, DecodedInputs

_IMAGE = "image_"


def save_inputs(path: Path, inputs: DecodedInputs) -> None:
    """Write the inputs; they are on disk, whole, when this returns.

    Raises:
        OSError: there is no room, or no right.
    """
    import numpy as np  # late: most servers' requests have no inputs

    arrays: dict[str, Any] = {f"{_IMAGE}{number}": image for number, image in enumerate(inputs.images)}
    arrays |= {"mask": inputs.mask, "last_image": inputs.last_image}
    if inputs.video is not None:
        arrays |= {"video": inputs.video.frames, "fps": np.array(inputs.video.fps or 0.0)}
    unfinished = path.with_suffix(".part")
    try:
        with unfinished.open("wb") as stream:
            np.savez(stream, **{name: array for name, array in arrays.items() if array is not None})
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_inputs(path: Path) -> DecodedInputs:
    """The inputs that `save_inputs` wrote.

    Raises:
        StorageError: the file is gone or damaged.
    """
    import numpy as np

    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise StorageError("what the video was to start from is gone; create it again") from error
    video = found.get("video")
    return DecodedInputs(
        images=tuple(found[name] for name in sorted(found, key=_number) if name.startswith(_IMAGE)),
        mask=found.get("mask"),
        last_image=found.get("last_image"),
        video=None if video is None else Clip(frames=video, fps=float(found["fps"]) or None),
    )


def _number(name: str) -> int:
    return int(name.removeprefix(_IMAGE)) if name.startswith(_IMAGE) else -1
