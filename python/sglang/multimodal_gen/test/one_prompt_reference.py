"""The reference's process of `sglang bench pipeline` with a pipeline that refuses several prompts, as some do."""

from __future__ import annotations

import functools
from typing import Any

import diffusers

from sglang.multimodal_gen.runtime.bench.worker.reference_pipeline import main


def refuse_several_prompts(pipeline_class: Any) -> None:
    """Its signature and what it makes of one prompt stay as they were."""
    call = pipeline_class.__call__

    @functools.wraps(call)
    def refusing(self: Any, prompt: Any = None, **arguments: Any) -> Any:
        if isinstance(prompt, list):
            raise ValueError(f"batch size 1 alone, got {len(prompt)}")
        return call(self, prompt=prompt, **arguments)

    pipeline_class.__call__ = refusing


if __name__ == "__main__":
    refuse_several_prompts(diffusers.WanPipeline)
    main()
