"""What layouts are compared by: requests that come one after the other, as one process and as ranks make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.test.media import picture
from sglang.multimodal_gen.test.pipeline_parity import admitted, finished, present_phase

Arrays = dict[str, np.ndarray]

# fp32 on both sides: what differs is the order in which parts are summed.
FORWARD_TOLERANCE = 1e-5


def made_of(pipeline: Any, wishes: Sequence[Mapping[str, Any]], *, num_pictures: int = 0) -> Arrays:
    """For each request what its texts became, its latents, its frames and what its step cache computed, and of one step
    all that the transformer predicts: there the first request is a step ahead of the others, and all of them share the
    forward. Each starts from `num_pictures` of its own.
    """
    inputs = [
        RequestInputs(images=tuple(picture(37, 50, 10 * number + index) for index in range(num_pictures)))
        for number in range(len(wishes))
    ]
    requests = admitted(pipeline, list(zip(wishes, inputs, strict=True)))
    with torch.inference_mode():
        for req in requests:
            _run_to_denoising(pipeline, req)
        stage = _shared_stage(pipeline, requests)
        pipeline.run_unit(stage.name, requests[:1])
        pipeline.run_unit(stage.name, requests)
        predictions = [prediction for own in stage.predict(requests) for prediction in own]
        results = finished(pipeline, requests)
    arrays = {f"predicted{number}": _array(prediction) for number, prediction in enumerate(predictions)}
    for number, (req, frames) in enumerate(results):
        arrays |= {f"frames{number}": frames, f"latents{number}": _array(req.latents)}
        if (cache := req.step_cache) is not None:
            arrays[f"computed{number}"] = np.array([cache.computed_steps, cache.computed_rows, cache.num_rows])
        texts = {"text": req.text, "negative": req.negative_text}
        for name, text in texts.items():
            if text is not None:
                arrays[f"{name}{number}"] = _array(text.embeds)
                if text.pooled is not None:
                    arrays[f"{name}_pooled{number}"] = _array(text.pooled)
    return arrays


def _run_to_denoising(pipeline: Any, req: Req) -> None:
    while (phase := present_phase(req)) is not None and phase.lane != "denoise":
        pipeline.run_unit(phase.name, [req])


def _shared_stage(pipeline: Any, requests: Sequence[Req]) -> Any:
    """The denoising stage in which all of them are, in one batch."""
    phases = [present_phase(req) for req in requests]
    assert all(phase is not None and phase.lane == "denoise" for phase in phases)
    [(name, _)] = {(phase.name, phase.batch_key) for phase in phases if phase is not None}
    return next(stage for stage in pipeline.stages if stage.name == name)


def _array(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.float().cpu().numpy()
