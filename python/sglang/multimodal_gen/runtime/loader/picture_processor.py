"""What prepares pictures for a vision encoder, as the checkpoint's own settings say.

Importing this module imports transformers, which takes seconds: only pipelines that need it do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from sglang.multimodal_gen.errors import CorruptCheckpoint
from sglang.multimodal_gen.runtime.loader.component_loader import LoadContext


@dataclass(frozen=True)
class PictureProcessor:
    """A component with the settings of transformers' image processor, alone or beside a tokenizer's files."""

    def __call__(self, directory: Path, class_name: str, context: LoadContext) -> Any:
        """Raises CorruptCheckpoint when there is none that can be read."""
        try:
            # Pillow's arithmetic, whatever else is installed: other backends round differently.
            return transformers.AutoImageProcessor.from_pretrained(directory, local_files_only=True, backend="pil")
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            raise CorruptCheckpoint(
                f"{directory.name} holds no settings of an image processor that can be read "
                f"({type(error).__name__}); download the checkpoint again"
            ) from error
