"""The embedded and tiny random Wan models on the device against the CPU, in fp32 and bf16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from gpu_checks.report import Report
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.tiny_checkpoints import TINY_WANS, save_tiny_wan

_TINY = ("plain", "deep", "patched_vae", "wide")
# Sums in another order; diffusers is equal to the CPU within the same bound in the test suite.
_LATENT_TOLERANCE = 1e-4
_TINY_REQUEST = {"width": 48, "height": 80, "num_frames": 9, "num_inference_steps": 3}
_DEMO_REQUEST = {"num_inference_steps": 8}
_WISH = {"prompt": "a red circle moving right", "negative_prompt": "", "guidance_scale": 4.0, "seed": 5}
_TEXT_TOKENS = 64


def make_checkpoints(directory: Path) -> Iterator[tuple[str, str]]:
    """Name and path of each checkpoint to check."""
    yield "demo", "demo"
    for name in _TINY:
        yield name, str(save_tiny_wan(directory / name, TINY_WANS[name]))


def check_checkpoint(report: Report, name: str, path: str, device: torch.device) -> None:
    """Whole requests in fp32, and the transformer alone in bf16, where errors of single steps do not pile up."""
    values = _WISH | (_DEMO_REQUEST if name == "demo" else _TINY_REQUEST)
    with report.check(f"parity {name} fp32") as result:
        latents, frames = _run(path, "cpu", values)
        there, frames_there = _run(path, device.type, values)
        error = ((there - latents).norm() / latents.norm()).item()
        level = int(np.abs(frames.astype(int) - frames_there.astype(int)).max())
        good = error <= _LATENT_TOLERANCE and level <= 1
        result.expect(good, f"latents {error:.1e} from the CPU, frames {level}/255", latents=error, level=level)
    with report.check(f"parity {name} bf16") as result:
        ours, theirs = _bf16_errors(path, device)
        detail = f"transformer {ours:.2e} from fp32, diffusers {theirs:.2e}"
        result.expect(ours <= 1.25 * theirs, detail, ours=ours, diffusers=theirs)


def _run(path: str, device: str, values: dict[str, Any]) -> tuple[Tensor, np.ndarray]:
    pipeline = build_pipeline(path, ExecutionArgs(device=device, precision="fp32"))
    req = pipeline.admit("check", SamplingParams.from_values(values))
    frames = []
    for phase in req.phases:
        for _ in range(phase.units):
            frames += [output.frames for output in pipeline.run_unit(phase.name, [req])]
    assert req.latents is not None
    return req.latents.cpu(), torch.cat(frames).numpy()


def _bf16_errors(path: str, device: torch.device) -> tuple[float, float]:
    """Our transformer's and diffusers' error in bf16, each against its own fp32."""
    directory = get_model_info(path).local_path
    assert directory is not None, "local checkpoints only"
    errors = []
    for family in ("ours", "diffusers"):
        outputs = []
        for dtype in (torch.float32, torch.bfloat16):
            model, config = _transformer(family, path, directory, dtype, device)
            outputs.append(model(*_inputs(config, dtype, device)).float())
        errors.append(((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item())
    return errors[0], errors[1]


def _transformer(family: str, path: str, directory: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    if family == "ours":
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        model = build_pipeline(path, ExecutionArgs(device=device.type, precision=precision)).modules["transformer"]
        return model, model.config
    model = diffusers.WanTransformer3DModel.from_pretrained(
        directory, subfolder="transformer", torch_dtype=dtype, local_files_only=True
    ).to(device)
    return (lambda latents, timestep, text: model(latents, timestep, text, return_dict=False)[0]), model.config


def _inputs(config: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    latents = torch.randn(2, config.in_channels, 3, 8, 8, generator=generator)
    text = torch.randn(2, _TEXT_TOKENS, config.text_dim, generator=generator)
    return latents.to(device, dtype), torch.tensor([900.0, 250.0], device=device), text.to(device, dtype)
