"""Count the parameters of every published checkpoint from its configs, for `sglang models`.

Writes `configs/published/sizes.json`: hub id -> component -> number of parameters. Modules are built without memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from sglang.multimodal_gen.configs.published import SIZES_FILE, published_directory, published_ids


def components(directory: Path) -> dict[str, int]:
    """Number of parameters of each component that has a config."""
    index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
    found = {}
    for name, listed in sorted(index.items()):
        if isinstance(listed, list) and (directory / name / "config.json").is_file():
            found[name] = sum(parameter.numel() for parameter in _module(directory / name, *listed).parameters())
    return found


def _module(directory: Path, library: str, class_name: str) -> Any:
    with torch.device("meta"):
        if library == "diffusers":
            cls = getattr(diffusers, class_name)
            return cls.from_config(cls.load_config(directory))
        cls = getattr(transformers, class_name)
        return cls(cls.config_class.from_pretrained(directory))


def main() -> int:
    """Count and write."""
    sizes = {hub_id: components(published_directory(hub_id)) for hub_id in published_ids()}
    SIZES_FILE.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(sizes)} checkpoints\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
