"""Third stage: the transformer by flow matching, on latents of the frozen autoencoder and text of the frozen encoder.

x_t = (1 - sigma) x_0 + sigma noise; the network sees 1000 sigma and predicts noise - x_0. Source: arXiv:2210.02747.
"""

from __future__ import annotations

import time

import torch
import torch._dynamo.config
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from demo_model.graphs import RecordedFunction
from demo_model.latents import LatentStock
from demo_model.networks import build_transformer, encode_text
from demo_model.optimisation import Optimiser, cosine
from demo_model.session import Pace, Session, logger
from demo_model.text_training import load_tokenizer, load_trained
from demo_model.vae_training import load_frozen
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel

_PEAK_RATE, _WARMUP_STEPS, _LONGEST_AVERAGE = 1.0e-3, 300, 0.9993
# Noise levels: logit-normal, moved towards noise as the sampler's are; a share is uniform so that none is rare.
SHIFT = 3.0
_SPREAD, _UNIFORM_SHARE = 1.0, 0.15
# One step in seven shows single images.
_IMAGE_EVERY = 7
# Weights to begin with, where there are any: those of a checkpoint that training goes on from.
START = "transformer-start.safetensors"
_LOG_EVERY = 50
# Share of the time that may go into new clips, once the first ones are there.
_RENEWAL_SHARE = 0.2
_RENEWED_CLIPS, _RENEWED_IMAGES = 32, 64


def train_dit(session: Session, budget_s: float, *, batch_size: int) -> bool:
    """Train until the budget or the command's time is used; returns whether the transformer is finished."""
    tokenizer, encoder = load_tokenizer(session), load_trained(session)
    torch.manual_seed(session.seed)
    transformer = build_transformer(session.sizes, folded_text=True)
    start = session.work_dir / START
    if start.exists():
        transformer.load_state_dict(load_file(start))
    optimiser = Optimiser({"transformer": transformer}, session.ranks, betas=(0.9, 0.98))
    path = session.work_dir / "dit-state.pt"
    if path.exists():
        optimiser.load(path)
    if optimiser.elapsed_s >= budget_s:
        return True
    stocks = _fill_stocks(session, tokenizer, optimiser.step_count)
    step = _Step(session, transformer, encoder, stocks, batch_size)
    step.warm_up(optimiser)
    pace = Pace(session, optimiser, path, budget_s)
    _loop(session, optimiser, pace, step, stocks)
    return pace.finished


def _fill_stocks(session: Session, tokenizer: Tokenizer, salt: int) -> tuple[LatentStock, LatentStock]:
    """Enough clips and images to begin with; the salt keeps them apart from those of other commands."""
    vae, trial = load_frozen(session), session.trial
    videos = LatentStock(
        session, vae, tokenizer, num_frames=5 if trial else 33, capacity=16 if trial else 36_864, salt=salt
    )
    images = LatentStock(session, vae, tokenizer, num_frames=1, capacity=16 if trial else 24_576, salt=salt)
    while videos.size < (8 if trial else 8192):
        videos.renew(4 if trial else 64)
    while images.size < (8 if trial else 4096):
        images.renew(4 if trial else 256)
    return videos, images


class _Step:
    """Forward and backward of one batch."""

    def __init__(
        self,
        session: Session,
        transformer: WanTransformer3DModel,
        encoder: nn.Module,
        stocks: tuple[LatentStock, LatentStock],
        batch_size: int,
    ) -> None:
        self.session, self.transformer, self.encoder, self.stocks = session, transformer, encoder, stocks
        self.batch_size = batch_size
        self.generator = torch.Generator(session.device).manual_seed(session.seed + session.ranks.rank)
        self.recorded = RecordedFunction(session, "dit", self._accumulate)

    def warm_up(self, optimiser: Optimiser) -> None:
        """Compile the blocks for both shapes and record the step, or say what stays as it is. Changes no weight."""
        start = time.monotonic()
        if self.session.compiled:
            # Clips and images, in training; every block shares the code.
            torch._dynamo.config.recompile_limit = 64
            for block in self.transformer.blocks:
                block.compile(dynamic=False)
        try:
            for image in (False, True):
                self(image)
        except RuntimeError as error:
            if not self.session.compiled or isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning("blocks cannot be compiled, training goes on without: %s", str(error)[:2000])
            torch.compiler.set_stance("force_eager")
        if self.session.compiled:
            for image in (False, True):
                self.recorded.record(*self._draw(image))
        optimiser.flat.gradient.zero_()
        _synchronise(self.session.device)
        self.session.log("dit", warm_up_s=time.monotonic() - start, step=optimiser.step_count)

    def __call__(self, image: bool) -> Tensor:
        """Accumulate the gradients of one batch of clips or images; returns its loss."""
        return self.recorded(*self._draw(image))

    def _draw(self, image: bool) -> tuple[Tensor, ...]:
        """Noisy latents [B, 16, t, 16, 16], their noise levels [B], the velocity to predict, and token ids [B, L]."""
        latents, ids = self.stocks[image].draw(self.batch_size * (4 if image else 1))
        sigmas = sample_sigmas(len(latents), self.generator)
        noise = torch.randn(latents.shape, device=latents.device, generator=self.generator)
        return torch.lerp(latents, noise, sigmas.view(-1, 1, 1, 1, 1)), sigmas, noise - latents, ids

    def _accumulate(self, noisy: Tensor, sigmas: Tensor, velocity: Tensor, ids: Tensor) -> Tensor:
        text = encode_text(self.encoder, ids, (ids != 0).long())
        with self.session.autocast():
            predicted = self.transformer(noisy, 1000 * sigmas, text)
        loss = (predicted.float() - velocity).square().mean()
        loss.backward()
        return loss.detach()


def sample_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels of a batch, in 0 … 1: [B]."""
    device = generator.device
    normal = torch.randn(count, device=device, generator=generator)
    uniform = torch.rand(count, device=device, generator=generator)
    pick = torch.rand(count, device=device, generator=generator) < _UNIFORM_SHARE
    levels = torch.where(pick, uniform, torch.sigmoid(_SPREAD * normal))
    return SHIFT * levels / (1 + (SHIFT - 1) * levels)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _renewal_interval(session: Session, step: _Step, stocks: tuple[LatentStock, LatentStock]) -> int:
    """Steps between renewals that keep to the share of time that they may take, the same on every rank."""
    times = []
    for action in (lambda: stocks[0].renew(4 if session.trial else _RENEWED_CLIPS), lambda: step(False)):
        _synchronise(session.device)
        start = time.monotonic()
        for _ in range(3):
            action()
        _synchronise(session.device)
        times.append((time.monotonic() - start) / 3)
    renewal_s, step_s = session.ranks.from_first(times)
    interval = max(1, round(renewal_s / (_RENEWAL_SHARE * step_s)))
    session.log("dit", renewal_s=renewal_s, step_s=step_s, renewal_interval=interval, stock=stocks[0].size)
    return interval


def _loop(
    session: Session, optimiser: Optimiser, pace: Pace, step: _Step, stocks: tuple[LatentStock, LatentStock]
) -> None:
    interval = _renewal_interval(session, step, stocks)
    optimiser.flat.gradient.zero_()
    sums, counts = torch.zeros(2, device=session.device), [0, 0]
    since = time.monotonic()
    while not pace.stopped:
        count = optimiser.step_count
        image = count % _IMAGE_EVERY == _IMAGE_EVERY - 1
        sums[int(image)] += step(image)
        counts[image] += 1
        rate = cosine(pace.progress, count, peak=_PEAK_RATE, warmup_steps=_WARMUP_STEPS)
        optimiser.step(rate, _LONGEST_AVERAGE)
        if count % interval == 0:
            stocks[0].renew(4 if session.trial else _RENEWED_CLIPS)
        if count % (8 * interval) == 0:
            stocks[1].renew(4 if session.trial else _RENEWED_IMAGES)
        if optimiser.step_count % _LOG_EVERY == 0:
            video_loss, image_loss = sums.tolist()
            session.log(
                "dit",
                step=optimiser.step_count,
                elapsed_s=optimiser.elapsed_s,
                video_loss=video_loss / max(1, counts[0]),
                image_loss=image_loss / max(1, counts[1]),
                learning_rate=rate,
                gradient_norm=optimiser.gradient_norm.item(),
                skipped=int(optimiser.skipped.item()),
                step_ms=(time.monotonic() - since) / _LOG_EVERY * 1000,
                stock=stocks[0].size,
            )
            sums.zero_()
            counts, since = [0, 0], time.monotonic()
        pace.tick()
