"""A stock of encoded clips with their captions in device memory, of which a part is always being renewed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo_model.captions import describe
from demo_model.clips import render, to_model_range
from demo_model.scenes import sample_scenes
from demo_model.session import Session
from demo_model.tokenizer import encode
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan

_CAPTIONS_PER_CLIP = 4


class LatentStock:
    """Normalised latents [N, 16, t, 16, 16] in bf16 with captions; the oldest make room for new ones.

    36,864 clips of 33 frames take 2.7 GB.
    """

    def __init__(
        self, session: Session, vae: AutoencoderKLWan, tokenizer: Tokenizer, *, num_frames: int, capacity: int, salt: int
    ) -> None:
        """`salt` sets this stock's random clips apart from those of other stocks and commands."""
        self.session, self.vae, self.tokenizer, self.num_frames, self.capacity = session, vae, tokenizer, num_frames, capacity
        device, length = session.device, session.sizes.text_length
        latent_frames = (num_frames - 1) // 4 + 1
        self.latents = torch.zeros(capacity, 16, latent_frames, 16, 16, dtype=torch.bfloat16, device=device)
        self.ids = torch.zeros(capacity, _CAPTIONS_PER_CLIP, length, dtype=torch.int16, device=device)
        self.size = self._next = 0
        seed = (session.seed, session.ranks.rank, num_frames, salt)
        self._rng = np.random.default_rng(seed)
        self._text_rng = random.Random(repr(seed))
        self._generator = torch.Generator(device).manual_seed(hash(seed) % 2**31)

    def load(self, path: Path) -> None:
        """Take over a stock that `save` wrote; a file that is missing or of another size is left alone."""
        if not path.exists():
            return
        saved = torch.load(path, map_location=self.session.device, weights_only=True)
        if saved["latents"].shape[1:] == self.latents.shape[1:] and len(saved["latents"]) <= self.capacity:
            self.size = self._next = len(saved["latents"])
            self.latents[: self.size], self.ids[: self.size] = saved["latents"], saved["ids"]
            self._next %= self.capacity

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part")
        torch.save({"latents": self.latents[: self.size].clone(), "ids": self.ids[: self.size].clone()}, part)
        part.replace(path)

    @torch.no_grad()
    def renew(self, count: int) -> None:
        """Draw, caption and encode `count` clips; they take free places first, then the oldest ones."""
        video = self.num_frames > 1
        scenes = sample_scenes(self._rng, count, video=video)
        frames = render(scenes, num_frames=self.num_frames, device=self.session.device)
        with self.session.autocast():
            latents = self.vae.encode(to_model_range(frames)).mean
        facts = [scenes.facts(row, video=video) for row in range(count)]
        captions = [describe(item, self._text_rng) for item in facts for _ in range(_CAPTIONS_PER_CLIP)]
        ids, _ = encode(self.tokenizer, captions, self.ids.shape[2])
        rows = (self._next + torch.arange(count, device=self.session.device)) % self.capacity
        self.latents[rows] = self.vae.normalise(latents.float()).to(torch.bfloat16)
        tokens = torch.from_numpy(ids.astype(np.int16)).view(count, _CAPTIONS_PER_CLIP, -1)
        self.ids[rows] = tokens.to(self.session.device, non_blocking=True)
        self._next = (self._next + count) % self.capacity
        self.size = min(self.capacity, self.size + count)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """A random batch: latents [B, 16, t, 16, 16] in fp32 and token ids [B, L]."""
        device = self.session.device
        rows = torch.randint(self.size, (count,), device=device, generator=self._generator)
        captions = torch.randint(_CAPTIONS_PER_CLIP, (count,), device=device, generator=self._generator)
        return self.latents[rows].float(), self.ids[rows, captions].long()
