"""Writes the trained model as a diffusers checkpoint, and carries a training run from one machine to another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from demo_model.dit_training import SHIFT, START
from demo_model.networks import build_transformer
from demo_model.optimisation import FlatParameters
from demo_model.session import Session
from demo_model.text_training import load_tokenizer, load_trained
from demo_model.tokenizer import save_tokenizer
from demo_model.vae_training import is_frozen, load_frozen, save_frozen
from demo_model.vocabulary import FPS, FRAME_SIDE, NUM_FRAMES
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel

_MIB = 2**20
_LARGEST_FILE_BYTES, _LARGEST_TOTAL_BYTES = 16 * _MIB, 24 * _MIB
_SHARD_ELEMENTS = 14 * _MIB // 4
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_DIFFUSERS_VERSION = "0.35.0"
_MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": _DIFFUSERS_VERSION,
    "boundary_ratio": None,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": _DIFFUSERS_VERSION,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": SHIFT,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}


class Networks(NamedTuple):
    """The two networks that make latents from captions, and their tokenizer."""

    transformer: WanTransformer3DModel
    text_encoder: UMT5EncoderModel
    tokenizer: Tokenizer


# What the model was made for: our engine's sampling defaults, which diffusers does not read.
_GENERATION = {
    "width": FRAME_SIDE,
    "height": FRAME_SIDE,
    "num_frames": NUM_FRAMES,
    "fps": FPS,
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
    "negative_prompt": "",
    # How the blocks' output changes from step to step against the timestep's embedding, over three held-out captions.
    "teacache_params": {"coefficients": [0.884, -0.0235], "teacache_thresh": 0.2},
}


def averaged_networks(session: Session) -> Networks:
    """Networks in evaluation mode; the transformer has the averaged weights and takes folded text."""
    transformer = build_transformer(session.sizes, folded_text=True)
    flat = FlatParameters({"transformer": transformer}, session.device)
    state = torch.load(session.work_dir / "dit-state.pt", map_location=session.device, weights_only=True)
    flat.values.detach().copy_(state["average"])
    transformer.to(session.device).eval().requires_grad_(False)
    return Networks(transformer, load_trained(session), load_tokenizer(session))


def export(session: Session, folder: Path) -> None:
    """Write the checkpoint in bf16, as diffusers lays it out, in place of what is in `folder`.

    Raises:
        ValueError: a file or the whole is larger than the package may carry.
    """
    transformer, encoder, tokenizer = averaged_networks(session)
    vae = load_frozen(session)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name in ("transformer", "vae", "scheduler"):
        (part / name).mkdir(parents=True)
    _write_json(part / "model_index.json", _MODEL_INDEX)
    _write_json(part / "generation_config.json", _GENERATION)
    _write_json(part / "scheduler" / "scheduler_config.json", _SCHEDULER)
    for name, module, config in (
        ("transformer", transformer, transformer.config),
        ("vae", vae, vae.config),
    ):
        head = {"_class_name": type(module).__name__, "_diffusers_version": _DIFFUSERS_VERSION}
        _write_json(part / name / "config.json", head | dataclasses.asdict(config))
        save_file(_in_bf16(module), part / name / _WEIGHTS, {"format": "pt"})
    encoder.bfloat16().save_pretrained(part / "text_encoder")
    save_tokenizer(tokenizer, part / "tokenizer")
    check_sizes(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _in_bf16(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in module.state_dict().items()
    }


def check_sizes(folder: Path) -> None:
    """Raise ValueError if a file or the folder is too large for the package."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for path, size in sizes.items():
        if size > _LARGEST_FILE_BYTES:
            raise ValueError(f"{path.name} has {size / _MIB:.1f} MiB; at most {_LARGEST_FILE_BYTES / _MIB:.0f} may be")
    total = sum(sizes.values())
    if total > _LARGEST_TOTAL_BYTES:
        raise ValueError(f"the model has {total / _MIB:.1f} MiB; at most {_LARGEST_TOTAL_BYTES / _MIB:.0f} may be")


# Small files of a run, each there from some stage on; the frozen autoencoder has 10 MiB.
_CARRIED = ("tokenizer.json", "text-encoder.safetensors", "vae-statistics.json", "vae.safetensors")


def pack_run(session: Session, folder: Path) -> None:
    """Write what another machine needs to go on, in at most eight files of less than 16 MiB each.

    The averaged weights stand for the others, which they come close to; the optimiser's moments stay behind and come
    back within a few hundred steps. Of the autoencoder's training only what is not frozen yet is packed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _CARRIED:
        if (session.work_dir / name).exists():
            shutil.copyfile(session.work_dir / name, folder / name)
    stage = next((name for name in ("dit", "vae") if (session.work_dir / f"{name}-state.pt").exists()), None)
    if stage is None:
        return
    state = torch.load(session.work_dir / f"{stage}-state.pt", map_location="cpu", weights_only=True)
    for index, shard in enumerate(state["average"].split(_SHARD_ELEMENTS)):
        save_file({"flat": shard.clone()}, folder / f"average-{index}.safetensors")
    _write_json(
        folder / "run.json", {"stage": stage, "step_count": state["step_count"], "elapsed_s": state["elapsed_s"]}
    )


def unpack_run(session: Session, folder: Path) -> None:
    """The inverse of `pack_run`, into the session's folder."""
    for name in _CARRIED:
        if (folder / name).exists():
            shutil.copyfile(folder / name, session.work_dir / name)
    if not (folder / "run.json").exists():  # nothing but finished stages
        return
    run = json.loads((folder / "run.json").read_text())
    average = torch.cat([load_file(path)["flat"] for path in sorted(folder.glob("average-*.safetensors"))])
    state = {"values": average, "average": average, "adam": None}
    state |= {"step_count": run["step_count"], "elapsed_s": run["elapsed_s"]}
    torch.save(state, session.work_dir / f"{run['stage']}-state.pt")


def adopt_checkpoint(session: Session, folder: Path) -> None:
    """Begin from an exported checkpoint: its tokenizer and autoencoder are taken as they are, its transformer goes on.

    What the session's folder has already stays.
    """
    work_dir = session.work_dir
    config = json.loads((folder / "vae" / "config.json").read_text())
    vae, transformer = (
        {name: tensor.float() for name, tensor in load_file(folder / part / _WEIGHTS).items()}
        for part in ("vae", "transformer")
    )
    if not (work_dir / "tokenizer.json").exists():
        shutil.copyfile(folder / "tokenizer" / "tokenizer.json", work_dir / "tokenizer.json")
    if not is_frozen(session):
        save_frozen(session, vae, {name: config[name] for name in ("latents_mean", "latents_std")})
    if not (work_dir / START).exists():
        save_file(transformer, work_dir / START)
