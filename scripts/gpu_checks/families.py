"""A tiny random checkpoint of each native pipeline on the device against the CPU, in fp32 and bf16."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpu_checks.report import Report
from sglang.multimodal_gen.configs.memory_args import ALL_RESIDENT, MemoryArgs
from sglang.multimodal_gen.runtime.layers.forward_graphs import ForwardGraphs, graphs_of
from sglang.multimodal_gen.runtime.pipelines_core import ComposedPipelineBase, build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY, RequestInputs
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.pipeline_parity import (
    LATENT_TOLERANCE,
    admitted,
    present_phase,
    relative_error,
    run_together,
)
from sglang.multimodal_gen.test.tiny_flux import TINY_FLUXES, save_tiny_flux
from sglang.multimodal_gen.test.tiny_hunyuan_video import TINY_HUNYUAN_VIDEOS, save_tiny_hunyuan_video
from sglang.multimodal_gen.test.tiny_ltx import TINY_LTXS, save_tiny_ltx
from sglang.multimodal_gen.test.tiny_qwen_image import TINY_QWEN_IMAGES, save_tiny_qwen_image
from sglang.multimodal_gen.test.tiny_sd3 import TINY_SD3S, save_tiny_sd3
from sglang.multimodal_gen.test.tiny_wan_image import TINY_WAN_IMAGES, save_tiny_wan_image
from sglang.multimodal_gen.test.tiny_zimage import TINY_Z_IMAGES, save_tiny_zimage

_PICTURE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
_ONE_PICTURE = RequestInputs(images=(_PICTURE,))
# The device adds in another order than the CPU does; in bf16 that rounds otherwise, so the errors are alike, not equal.
_BF16_RATIO = 2.0


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A checkpoint and what to ask of it."""

    save: Callable[[Path], Path]
    inputs: RequestInputs = EMPTY
    values: dict[str, Any] = field(default_factory=dict)


_CFG = {"guidance_scale": 4.0, "negative_prompt": "green"}
_TRUE_CFG = {"true_cfg_scale": 4.0, "negative_prompt": "green"}
_SKIPPED_LAYERS = {"skip_guidance_layers": [0, 2], "skip_layer_guidance_stop": 0.9, "clip_skip": 1}
_BESIDE_PICTURES = {"max_sequence_length": 512}  # the template of edits counts some of its own tokens
_CASES = {
    "flux": _Case(save=lambda path: save_tiny_flux(path, TINY_FLUXES["dev"])),
    "qwen": _Case(save=lambda path: save_tiny_qwen_image(path, TINY_QWEN_IMAGES["plain"]), values=_TRUE_CFG),
    "qwen edit": _Case(
        save=lambda path: save_tiny_qwen_image(path, TINY_QWEN_IMAGES["edit"]),
        inputs=_ONE_PICTURE,
        values=_TRUE_CFG | _BESIDE_PICTURES,
    ),
    "qwen edit plus": _Case(
        save=lambda path: save_tiny_qwen_image(path, TINY_QWEN_IMAGES["edit_plus_2511"]),
        inputs=RequestInputs(images=(_PICTURE, _PICTURE[::-1].copy())),
        values=_BESIDE_PICTURES,
    ),
    "wan i2v": _Case(save=lambda path: save_tiny_wan_image(path, TINY_WAN_IMAGES["i2v"]), inputs=_ONE_PICTURE),
    "wan flf2v": _Case(
        save=lambda path: save_tiny_wan_image(path, TINY_WAN_IMAGES["flf2v"]),
        inputs=RequestInputs(images=(_PICTURE,), last_image=_PICTURE[:, ::-1].copy()),
    ),
    "wan t2v experts": _Case(save=lambda path: save_tiny_wan_image(path, TINY_WAN_IMAGES["t2v_experts"]), values=_CFG),
    "wan ti2v": _Case(
        save=lambda path: save_tiny_wan_image(path, TINY_WAN_IMAGES["ti2v"]), inputs=_ONE_PICTURE, values=_CFG
    ),
    "hunyuan t2v": _Case(save=lambda path: save_tiny_hunyuan_video(path, TINY_HUNYUAN_VIDEOS["t2v"]), values=_TRUE_CFG),
    "hunyuan i2v": _Case(
        save=lambda path: save_tiny_hunyuan_video(path, TINY_HUNYUAN_VIDEOS["i2v"]), inputs=_ONE_PICTURE
    ),
    "ltx": _Case(save=lambda path: save_tiny_ltx(path, TINY_LTXS["timed"]), values=_CFG),
    "ltx condition": _Case(save=lambda path: save_tiny_ltx(path, TINY_LTXS["condition"]), inputs=_ONE_PICTURE),
    "z-image": _Case(save=lambda path: save_tiny_zimage(path, TINY_Z_IMAGES["base"]), values=_CFG),
    "sd3": _Case(save=lambda path: save_tiny_sd3(path, TINY_SD3S["dual"]), values=_CFG | _SKIPPED_LAYERS),
}
_PINNED = MemoryArgs(performance_mode="memory")
_IN_FILES = MemoryArgs(performance_mode="memory", dit_layerwise_resident_layers=1, pin_cpu_memory=False)
_BASE = {"width": 64, "height": 64, "max_sequence_length": 16, "num_inference_steps": 3}
_PROMPTS = ({"prompt": "a red circle", "seed": 3}, {"prompt": "a blue star and a small square", "seed": 4})


def check_families(report: Report, device: torch.device, directory: Path) -> None:
    """Two requests at a time; in fp32 the CPU's latents, in bf16 as far from them as the CPU's own bf16."""
    for number, (name, case) in enumerate(_CASES.items()):
        exact: list[Tensor] = []
        path = None
        with report.check(f"family {name} fp32") as result:
            path = case.save(directory / str(number))
            exact, frames, _ = _run(path, "cpu", "fp32", case)
            there, frames_there, graphs = _run(path, device.type, "fp32", case)
            error = _error(there, exact)
            level = max(
                int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(frames, frames_there, strict=True)
            )
            num_graphs, failures = sum(each.num_graphs for each in graphs), [each.failure for each in graphs]
            good = error <= LATENT_TOLERANCE and level <= 1 and not any(failures)
            detail = f"latents {error:.1e} from the CPU, frames {level}/255, {num_graphs} CUDA graphs"
            result.expect(good, detail, latents=error, level=level, graphs=num_graphs)
        with report.check(f"family {name} without waiting") as result:
            assert path is not None, "no checkpoint"
            asks = _what_asks(path, device, case)
            result.expect(not asks, asks or "no step asks the device for what it has not computed yet")
        with report.check(f"family {name} on the host") as result:
            assert path is not None and exact, "no result in fp32"
            errors = [
                _error(_run(path, device.type, "fp32", case, memory)[0], exact) for memory in (_PINNED, _IN_FILES)
            ]
            detail = f"latents {errors[0]:.1e} from pinned memory, {errors[1]:.1e} through staging"
            result.expect(max(errors) <= LATENT_TOLERANCE, detail, pinned=errors[0], staged=errors[1])
        with report.check(f"family {name} bf16") as result:
            assert path is not None and exact, "no result in fp32"
            errors = [_error(_run(path, where, "bf16", case)[0], exact) for where in (device.type, "cpu")]
            detail = f"latents {errors[0]:.2e} from fp32, the CPU's {errors[1]:.2e}"
            result.expect(errors[0] <= _BF16_RATIO * errors[1], detail, here=errors[0], cpu=errors[1])


def _run(
    path: Path, device: str, precision: str, case: _Case, memory: MemoryArgs = ALL_RESIDENT
) -> tuple[list[Tensor], list[np.ndarray], list[ForwardGraphs]]:
    """Latents and frames of each request, and the graphs that each transformer ran by."""
    pipeline = _built(path, ExecutionArgs(device=device, precision=precision), memory)
    wishes = [(_values(pipeline, case) | prompt, case.inputs) for prompt in _PROMPTS]
    results = run_together(pipeline, wishes)
    latents = [req.latents for req, _ in results]
    modules = [module for module in pipeline.modules.values() if isinstance(module, nn.Module)]
    graphs = [found for module in modules if (found := graphs_of(module)) is not None]
    return [found.cpu() for found in latents if found is not None], [frames for _, frames in results], graphs


@torch.inference_mode(False)
def _built(path: Path, execution: ExecutionArgs, memory: MemoryArgs = ALL_RESIDENT) -> ComposedPipelineBase:
    """As a worker does it: tensors made under inference mode could not change places."""
    return build_pipeline(str(path), execution, memory=memory)


def _what_asks(path: Path, device: torch.device, case: _Case) -> str:
    """Where a step would make the host wait for the device, once what is kept between steps is there."""
    pipeline = _built(path, ExecutionArgs(device=device.type, precision="fp32"))
    [req] = admitted(pipeline, [(_values(pipeline, case) | _PROMPTS[0] | {"num_inference_steps": 6}, case.inputs)])
    with torch.inference_mode():
        while (phase := present_phase(req)) is not None and (phase.lane != "denoise" or req.done(phase.name) < 3):
            pipeline.run_unit(phase.name, [req])
        assert phase is not None, "it has more steps"
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            pipeline.run_unit(phase.name, [req])
        except RuntimeError as error:
            places = traceback.extract_tb(error.__traceback__)
            own = [place for place in places if "multimodal_gen" in place.filename]
            return f"{Path(own[-1].filename).name}:{own[-1].lineno}: {str(error).splitlines()[0]}"
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return ""


def _values(pipeline: Any, case: _Case) -> dict[str, Any]:
    clip = {"num_frames": 9} if any(task.endswith("V") for task in pipeline.model_info().tasks) else {}
    return _BASE | clip | case.values


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(relative_error(one, other) for one, other in zip(found, exact, strict=True))
