"""A stock of encoded clips with their captions in device memory, of which a part is always being renewed."""

from __future__ import annotations

import random
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo_model.captions import describe
from demo_model.clips import render, to_model_range
from demo_model.scenes import Scenes, sample_scenes
from demo_model.session import Session
from demo_model.tokenizer import encode
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import AutoencoderKLWan

_CAPTIONS_PER_CLIP = 4
# Which attribute is whose is learned from two objects alone, and each of them teaches what one object does.
_TWO_SHARE = 0.6


class LatentStock:
    """Normalised latents [N, 16, t, 16, 16] in bf16 with captions; the oldest make room for new ones.

    36,864 clips of 33 frames take 2.7 GB.
    """

    def __init__(
        self,
        session: Session,
        vae: AutoencoderKLWan,
        tokenizer: Tokenizer,
        *,
        num_frames: int,
        capacity: int,
        salt: int,
    ) -> None:
        """`salt` sets this stock's random clips apart from those of other stocks and commands."""
        self.session, self.vae, self.tokenizer = session, vae, tokenizer
        self.num_frames, self.capacity = num_frames, capacity
        device, length = session.device, session.sizes.text_length
        latent_frames = (num_frames - 1) // 4 + 1
        self.latents = torch.zeros(capacity, 16, latent_frames, 16, 16, dtype=torch.bfloat16, device=device)
        self.ids = torch.zeros(capacity, _CAPTIONS_PER_CLIP, length, dtype=torch.int16, device=device)
        self.size = self._next = 0
        seed = (session.seed, session.ranks.rank, num_frames, salt)
        self._rng = np.random.default_rng(seed)
        self._text_rng = random.Random(repr(seed))
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._prepared: Future[tuple[Scenes, Tensor]] | None = None
        self._generator = torch.Generator(device).manual_seed(hash(seed) % 2**31)

    @torch.no_grad()
    def renew(self, count: int) -> None:
        """Draw, caption and encode `count` clips; they take free places first, then the oldest ones.

        The next ones' scenes and captions are made in the background meanwhile.
        """
        prepared = self._prepared.result() if self._prepared is not None else self._prepare(count)
        self._prepared = self._worker.submit(self._prepare, count)
        scenes, ids = prepared
        device, count = self.session.device, len(scenes)
        frames = render(scenes, num_frames=self.num_frames, device=device)
        with self.session.autocast():
            latents = self.vae.encode(to_model_range(frames)).mean
        rows = (self._next + torch.arange(count, device=device)) % self.capacity
        self.latents[rows] = self.vae.normalise(latents.float()).to(torch.bfloat16)
        self.ids[rows] = ids.to(device, non_blocking=True)
        self._next = (self._next + count) % self.capacity
        self.size = min(self.capacity, self.size + count)

    def _prepare(self, count: int) -> tuple[Scenes, Tensor]:
        """Scenes and the token ids of their captions, [count, captions, L] int16, on the CPU."""
        video = self.num_frames > 1
        scenes = sample_scenes(self._rng, count, video=video, two_share=_TWO_SHARE)
        facts = [scenes.facts(row, video=video) for row in range(count)]
        captions = [describe(item, self._text_rng).text for item in facts for _ in range(_CAPTIONS_PER_CLIP)]
        ids, _ = encode(self.tokenizer, captions, self.ids.shape[2])
        return scenes, torch.from_numpy(ids.astype(np.int16)).view(count, _CAPTIONS_PER_CLIP, -1)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """A random batch: latents [B, 16, t, 16, 16] in fp32 and token ids [B, L]."""
        device = self.session.device
        rows = torch.randint(self.size, (count,), device=device, generator=self._generator)
        captions = torch.randint(_CAPTIONS_PER_CLIP, (count,), device=device, generator=self._generator)
        return self.latents[rows].float(), self.ids[rows, captions].long()
