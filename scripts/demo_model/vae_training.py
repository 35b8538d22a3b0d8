"""Second stage: the autoencoder alone, then the statistics of its latents. Afterwards it never changes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo_model.clips import frame_times, render, to_model_range
from demo_model.graphs import RecordedFunction
from demo_model.networks import autoencode, build_vae
from demo_model.optimisation import Optimiser, cosine
from demo_model.scenes import sample_scenes
from demo_model.session import Pace, Session, logger
from demo_model.vocabulary import NUM_FRAMES
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan

_PEAK_RATE, _WARMUP_STEPS, _LONGEST_AVERAGE = 1.0e-3, 100, 0.998
# Edges are a small part of the picture and most of what makes it crisp.
_EDGE_WEIGHT = 1.0
# Per latent element, of which there is one for 43 of the pixels' elements.
_KL_WEIGHT = 1.0e-6
# Log-variance of the latents at the start: noise of one would drown what the encoder has to say.
_FIRST_LOGVAR = -6.0
_LEAST_PSNR = 35.0
# (frames, clips). Single images teach space cheaply, so they come first; then short and whole clips teach time. Three
# shapes in all, since cuDNN spends seconds on choosing kernels for each.
_FIRST_KINDS = ((1, 96), (1, 96), (1, 96), (9, 24))
_KINDS = ((9, 24), (33, 8), (9, 24), (1, 96))
_FIRST_SHARE = 0.35
_TRIAL_KINDS = ((5, 1), (1, 2))
# Squares pull flat areas to their colour early on, where the gradient of absolute values only has a sign.
_SQUARE_WEIGHT = 2.0
_LOG_EVERY = 50


def train_vae(session: Session, budget_s: float) -> bool:
    """Train until the budget or the command's time is used; returns whether the autoencoder is finished."""
    torch.manual_seed(session.seed)
    vae = build_vae(session.sizes).to(session.device)
    initialise(vae)
    optimiser = Optimiser({"vae": vae}, session.ranks, betas=(0.9, 0.99))
    path = session.work_dir / "vae-state.pt"
    if path.exists():
        optimiser.load(path)
    # Of the ten plans that are tried by default, the first few are the best ones; trying takes seconds.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 5
    step = RecordedFunction(session, "vae", lambda video: _accumulate(session, vae, video))
    if session.compiled:
        _record(session, step)
        optimiser.flat.gradient.zero_()
    pace = Pace(session, optimiser, path, budget_s)
    batches = _batches(session, optimiser.step_count, pace)
    losses = torch.zeros(3, device=session.device)
    while not pace.stopped:
        losses += step(next(batches))
        rate = cosine(pace.progress, optimiser.step_count, peak=_PEAK_RATE, warmup_steps=_WARMUP_STEPS)
        optimiser.step(rate, _LONGEST_AVERAGE)
        if optimiser.step_count % _LOG_EVERY == 0:
            pixel, edge, kl = (losses / _LOG_EVERY).tolist()
            session.log(
                "vae",
                step=optimiser.step_count,
                elapsed_s=optimiser.elapsed_s,
                pixel=pixel,
                edge=edge,
                kl=kl,
                gradient_norm=optimiser.gradient_norm.item(),
                skipped=int(optimiser.skipped.item()),
                memory_gib=_peak_memory(session.device),
            )
            losses.zero_()
        pace.tick()
    vae.load_state_dict(optimiser.averaged("vae"))
    good = 0.0
    if session.leads:
        quality = measure_psnr(session, vae)
        good = float(session.trial or is_good_enough(quality))
        session.log("vae", step=optimiser.step_count, good=bool(good), **quality)
        if pace.finished and good:
            freeze(session, vae)
        elif pace.finished:
            logger.error("the autoencoder is below %.0f dB: go on with a larger --vae-budget-s", _LEAST_PSNR)
    # Nothing may be trained on latents that have lost the picture.
    return bool(session.ranks.from_first([good])[0]) and pace.finished


def is_good_enough(quality: Mapping[str, float]) -> bool:
    """Whether clips and images both come back with the PSNR that the transformer's training asks for."""
    return min(quality["psnr_video"], quality["psnr_image"]) >= _LEAST_PSNR


@torch.no_grad()
def initialise(vae: AutoencoderKLWan) -> None:
    """Weights that keep the scale of what passes, no biases, and each frame by itself.

    Only the latest temporal slice of a kernel starts above zero: it is all that single frames meet. Residual branches
    start small. With torch's own start, biases outweigh the picture: 18 dB instead of 27 after 480 steps on images.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Conv3d):
            continue
        assert module.bias is not None
        module.bias.zero_()
        kernel = module.weight
        if isinstance(module, nn.Conv3d):
            kernel.zero_()
            kernel = kernel[:, :, -1]
        kernel.normal_(std=kernel[0].numel() ** -0.5)
        if name.endswith("conv2"):
            kernel.mul_(0.1)
    assert vae.quant_conv.bias is not None
    vae.quant_conv.bias[vae.config.z_dim :] = _FIRST_LOGVAR


def _peak_memory(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def _batches(session: Session, start: int, pace: Pace) -> Iterator[Tensor]:
    """Freshly drawn clips in the model's range, [B, 3, T, H, W]; every kind in turn."""
    rng = np.random.default_rng((session.seed, session.ranks.rank, start))
    for turn in itertools.count():
        kinds: tuple[tuple[int, int], ...] = _FIRST_KINDS if pace.progress < _FIRST_SHARE else _KINDS
        kinds = _TRIAL_KINDS if session.trial else kinds
        frames, count = kinds[turn % len(kinds)]
        scenes = sample_scenes(rng, count)
        # A short clip is a part of a whole one, at its speed.
        first = rng.integers(NUM_FRAMES - frames + 1)
        times = frame_times(NUM_FRAMES)[first : first + frames]
        yield to_model_range(render(scenes, times=times, device=session.device))


def _record(session: Session, step: RecordedFunction) -> None:
    """Record the step for every shape that training meets."""
    rng = np.random.default_rng((session.seed, 1))
    for frames, count in sorted({*_FIRST_KINDS, *_KINDS}):
        times = frame_times(NUM_FRAMES)[:frames]
        step.record(to_model_range(render(sample_scenes(rng, count), times=times, device=session.device)))


def _accumulate(session: Session, vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Accumulate the gradients of one batch; returns the three terms of the loss, [3]."""
    with session.autocast():
        rebuilt, mean, logvar = autoencode(vae, video)
    rebuilt, mean, logvar = rebuilt.float(), mean.float(), logvar.float()
    pixel = (rebuilt - video).abs().mean()
    edge = _slope_difference(rebuilt, video)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    square = (rebuilt - video).square().mean()
    (pixel + _SQUARE_WEIGHT * square + _EDGE_WEIGHT * edge + _KL_WEIGHT * kl).backward()
    return torch.stack((pixel.detach(), edge.detach(), kl.detach()))


def _slope_difference(rebuilt: Tensor, video: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours in time, height and width."""
    error = rebuilt - video
    terms = [error.diff(dim=dim).abs().mean() for dim in (2, 3, 4) if error.shape[dim] > 1]
    return torch.stack(terms).mean()


@torch.no_grad()
def measure_psnr(session: Session, vae: AutoencoderKLWan) -> dict[str, float]:
    """Mean and worst PSNR in dB over clips that training never drew, of the mean latents, as shown (0 … 255)."""
    rng = np.random.default_rng((session.seed, 999_983))
    results: dict[str, float] = {}
    frames = 9 if session.trial else 33
    for name, num_frames, rounds, count in (("video", frames, 2 if session.trial else 16, 2), ("image", 1, 2, 16)):
        values = []
        for _ in range(rounds):
            scenes = sample_scenes(rng, count, video=num_frames > 1, training=False)
            clip = render(scenes, num_frames=num_frames, device=session.device)
            with session.autocast():
                rebuilt = vae.decode(vae.encode(to_model_range(clip)).mean)
            shown = ((rebuilt.float().permute(0, 2, 3, 4, 1) + 1) / 2 * 255).round() / 255
            values.append((clip - shown).square().flatten(2).mean(dim=-1))  # [B, T]
        error = torch.cat(values)
        decibels = -10 * error.clamp_min(1e-10).log10()
        results |= {
            f"psnr_{name}": float(-10 * error.mean(dim=1).log10().mean()),
            f"psnr_{name}_worst_frame": float(decibels.min()),
        }
        if num_frames > 1:
            results["psnr_first_frame"] = float(decibels[:, 0].mean())
    return results


@torch.no_grad()
def freeze(session: Session, vae: AutoencoderKLWan) -> None:
    """Write the finished weights (fp32) and the mean and deviation of each latent channel."""
    rng = np.random.default_rng((session.seed, 77))
    total = torch.zeros(3, session.sizes.vae.z_dim, dtype=torch.float64, device=session.device)
    frames, clips, images = (9, 2, 2) if session.trial else (33, 16, 64)
    for round_index in range(2 if session.trial else 72):
        # Every fourth round shows single images: about as many first frames as a mixed batch has.
        video = round_index % 4 != 3
        scenes = sample_scenes(rng, clips if video else images, video=video)
        pixels = to_model_range(render(scenes, num_frames=frames if video else 1, device=session.device))
        with session.autocast():
            latents = vae.encode(pixels).mean
        values = latents.double().transpose(0, 1).flatten(1)
        total += torch.stack((values.sum(1), values.square().sum(1), torch.full_like(values[:, 0], values.shape[1])))
    mean = total[0] / total[2]
    deviation = (total[1] / total[2] - mean.square()).sqrt()
    statistics = {"latents_mean": mean.tolist(), "latents_std": deviation.tolist()}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in vae.state_dict().items()}
    save_frozen(session, weights, statistics)
    session.log("vae", **statistics)


def save_frozen(session: Session, weights: dict[str, Tensor], statistics: dict[str, list[float]]) -> None:
    """Write the finished autoencoder."""
    save_file(weights, session.work_dir / "vae.safetensors")
    # Written last: its presence says that the stage is complete.
    (session.work_dir / "vae-statistics.json").write_text(json.dumps(statistics))


def is_frozen(session: Session) -> bool:
    return (session.work_dir / "vae-statistics.json").exists()


def load_frozen(session: Session) -> AutoencoderKLWan:
    """The finished autoencoder, in evaluation mode and without gradients."""
    statistics = json.loads((session.work_dir / "vae-statistics.json").read_text())
    vae = build_vae(session.sizes, statistics)
    vae.load_state_dict(load_file(session.work_dir / "vae.safetensors"))
    return vae.to(session.device).eval().requires_grad_(False)
