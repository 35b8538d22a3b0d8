"""First stage: the text encoder, on captions alone. Afterwards it never changes.

Trained with the transformer from the start, an encoder this small ends as a bag of words: its attention hardens before
the order of words pays, and no caption says any more whether the star or the background is green. So it first learns
what the transformer will ask of it: every token tells the scene (how many objects, which background) and all that the
caption says of the object that its word belongs to.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from demo_model.captions import NOBODY, Caption, describe
from demo_model.networks import build_text_encoder, encode_text
from demo_model.optimisation import Optimiser, cosine
from demo_model.scenes import sample_scenes
from demo_model.session import Pace, Session, logger
from demo_model.tokenizer import corpus, train_tokenizer
from demo_model.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, POSITIONS, SHAPES, SIZES

_PEAK_RATE, _WARMUP_STEPS, _LONGEST_AVERAGE = 1.5e-3, 200, 0.998
_LOG_EVERY = 100
_TOKENIZER = "tokenizer.json"
# Share of tokens that must tell everything right before anything is trained on the encoder.
_LEAST_RIGHT = 0.99
# What a token tells; 0 stands for "not said". The first is the number of objects.
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("objects", ("one", "two")),
    ("background", tuple(BACKGROUNDS)),
    ("colour", tuple(COLOURS)),
    ("shape", SHAPES),
    ("motion", MOTIONS),
    ("size", SIZES),
    ("position", POSITIONS),
)
_NUM_CLASSES = [len(names) + 1 for _, names in _NAMES]
_UNTOLD = -1  # label of padding


def load_tokenizer(session: Session) -> Tokenizer:
    """The run's tokenizer. Any rank may ask for it alone."""
    return Tokenizer.from_file(str(session.work_dir / _TOKENIZER))


def _make_tokenizer(session: Session) -> None:
    path = session.work_dir / _TOKENIZER
    if session.leads and not path.exists():
        train_tokenizer(corpus(300 if session.trial else 8000)).save(str(path))
    session.ranks.wait()


def train_text(session: Session, budget_s: float) -> bool:
    """Train until the budget or the command's time is used; returns whether the encoder is finished."""
    _make_tokenizer(session)
    tokenizer = load_tokenizer(session)
    torch.manual_seed(session.seed)
    encoder = build_text_encoder(session.sizes, tokenizer.get_vocab_size())
    reader = nn.Linear(session.sizes.text_dim, sum(_NUM_CLASSES))
    optimiser = Optimiser({"text_encoder": encoder, "reader": reader}, session.ranks, betas=(0.9, 0.98))
    path = session.work_dir / "text-state.pt"
    if path.exists():
        optimiser.load(path)
    pace = Pace(session, optimiser, path, budget_s)
    lessons = _Lessons(session, tokenizer, 64 if session.trial else 40_000, salt=optimiser.step_count)
    loss = torch.zeros((), device=session.device)
    while not pace.stopped:
        ids, labels = lessons.draw(8 if session.trial else 128)
        step_loss = _loss(reader(encode_text(encoder, ids, ids != 0)), labels)
        step_loss.backward()
        loss += step_loss.detach()
        rate = cosine(pace.progress, optimiser.step_count, peak=_PEAK_RATE, warmup_steps=_WARMUP_STEPS)
        optimiser.step(rate, _LONGEST_AVERAGE)
        if optimiser.step_count % _LOG_EVERY == 0:
            mean = float(loss) / _LOG_EVERY
            session.log("text", step=optimiser.step_count, elapsed_s=optimiser.elapsed_s, loss=mean)
            loss.zero_()
        pace.tick()
    encoder.load_state_dict(optimiser.averaged("text_encoder"), strict=False)  # the tied copy has no name of its own
    reader.load_state_dict(optimiser.averaged("reader"))
    good = 0.0
    if session.leads:
        quality = _measure(session, tokenizer, encoder, reader)
        good = float(session.trial or quality["right"] >= _LEAST_RIGHT)
        session.log("text", step=optimiser.step_count, good=bool(good), **quality)
        if pace.finished and good:
            weights = {name: value.detach().cpu().clone() for name, value in optimiser.averaged("text_encoder").items()}
            save_file(weights, session.work_dir / "text-encoder.safetensors")
        elif pace.finished:
            logger.error("the text encoder is below %.3f: go on with a larger --text-budget-s", _LEAST_RIGHT)
    return bool(session.ranks.from_first([good])[0]) and pace.finished


def is_trained(session: Session) -> bool:
    return (session.work_dir / "text-encoder.safetensors").exists()


def load_trained(session: Session) -> UMT5EncoderModel:
    """The finished text encoder, in evaluation mode and without gradients."""
    encoder = build_text_encoder(session.sizes, load_tokenizer(session).get_vocab_size())
    encoder.load_state_dict(load_file(session.work_dir / "text-encoder.safetensors"), strict=False)
    return encoder.to(session.device).eval().requires_grad_(False)


class _Lessons:
    """Captions as token ids [N, L] with what each token has to tell [N, L, 7]."""

    def __init__(self, session: Session, tokenizer: Tokenizer, count: int, *, salt: int, training: bool = True) -> None:
        seed = (session.seed, session.ranks.rank, salt, int(training))
        rng, text_rng = np.random.default_rng(seed), random.Random(repr(seed))
        captions: list[Caption] = []
        for video, share in ((True, 0.75), (False, 0.25)):
            scenes = sample_scenes(rng, round(count * share), video=video, two_share=0.5, training=training)
            captions += [describe(scenes.facts(row, video=video), text_rng) for row in range(len(scenes))]
        text_rng.shuffle(captions)
        length = session.sizes.text_length
        ids = np.zeros((len(captions), length), dtype=np.int64)
        labels = np.full((len(captions), length, len(_NAMES)), _UNTOLD, dtype=np.int64)
        encodings = tokenizer.encode_batch([caption.text for caption in captions])
        for row, (caption, encoding) in enumerate(zip(captions, encodings, strict=True)):
            size = min(length - 1, len(encoding.ids))
            ids[row, :size] = encoding.ids[:size]
            labels[row, :size] = what_tokens_tell(caption, encoding.offsets)[:size]
        self._lengths = (ids != 0).sum(axis=1)
        self.ids, self.labels = torch.from_numpy(ids).to(session.device), torch.from_numpy(labels).to(session.device)
        self._rng = np.random.default_rng((*seed, 1))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] and labels [B, L, 7], L that of the longest and one more."""
        rows = self._rng.integers(len(self.ids), size=count)
        length = int(self._lengths[rows].max()) + 1
        return self.ids[rows, :length], self.labels[rows, :length]


def what_tokens_tell(caption: Caption, offsets: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Classes [tokens, 7] from the tokens' places in the text; `</s>`, which has none, tells the scene alone."""
    told = caption.told
    scene = [_class("background", told.background)]
    rows = []
    for _, end in offsets:
        # Counted up to the token's last character; a token may begin with the space before its word.
        owner = caption.owners[caption.text.count(" ", 0, end)] if end > 0 else NOBODY
        item = told.objects[owner] if owner >= 0 else None
        own = [_class(name, item and getattr(item, name)) for name, _ in _NAMES[2:]]
        rows.append([len(told.objects), *scene, *own])
    return np.array(rows, dtype=np.int64).reshape(len(offsets), len(_NAMES))


def _class(name: str, value: str | None) -> int:
    return 0 if value is None else dict(_NAMES)[name].index(value) + 1


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of all answers; logits [B, L, classes of all questions], labels [B, L, 7]."""
    parts = logits.split(_NUM_CLASSES, dim=-1)
    losses = [
        F.cross_entropy(part.flatten(0, 1), labels[..., index].flatten(), ignore_index=_UNTOLD)
        for index, part in enumerate(parts)
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def _measure(session: Session, tokenizer: Tokenizer, encoder: nn.Module, reader: nn.Module) -> dict[str, float]:
    """Share of right answers on captions of scenes that training never drew, held-out combinations among them."""
    lessons = _Lessons(session, tokenizer, 64 if session.trial else 4000, salt=0, training=False)
    known = lessons.labels[..., 0] != _UNTOLD
    logits = torch.cat([reader(encode_text(encoder, ids, ids != 0)) for ids in lessons.ids.split(500)])
    answers = torch.stack([part.argmax(-1) for part in logits.split(_NUM_CLASSES, dim=-1)], dim=-1)
    right = (answers == lessons.labels)[known]
    shares = dict(zip((name for name, _ in _NAMES), right.double().mean(dim=0).tolist(), strict=True))
    return {"right": float(right.all(dim=-1).double().mean()), **shares}
