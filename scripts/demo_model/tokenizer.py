"""Trains the demo model's tokenizer: a small unigram vocabulary over captions, with bytes for everything else."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo_model.captions import PLAIN_WORDS, describe
from demo_model.scenes import sample_scenes

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5
MAX_LENGTH = 512
# A whole word beats any two pieces of it, and bytes are the last resort.
_WORD_SCORE, _PIECE_SCORE, _BYTE_SCORE = -2.0, -4.0, -40.0
_WORD = re.compile(r"[a-z0-9]+|[^a-z0-9\s]")


def corpus(num_captions: int = 8000, seed: int = 0) -> list[str]:
    """Training captions, and each plain word a few times so that it becomes a token or two."""
    scenes, rng = sample_scenes(np.random.default_rng(seed), num_captions), random.Random(seed)
    captions = [describe(scenes.facts(row, video=rng.random() < 0.8), rng).text for row in range(num_captions)]
    return captions + [word for word in PLAIN_WORDS for _ in range(10)]


def train_tokenizer(texts: list[str], vocabulary_size: int = 1024) -> Tokenizer:
    """A unigram tokenizer, lower-casing, that ends every text with `</s>` and has a token for each byte."""
    words = {word for text in set(texts) for word in _WORD.findall(text.lower())}
    scores = {f"▁{word}" if word.isalnum() else word: _WORD_SCORE for word in sorted(words)}
    trained = _bare(models.Unigram())
    trained.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=vocabulary_size - 256 - len(scores),
            special_tokens=[PAD, END, UNKNOWN],
            unk_token=UNKNOWN,
            initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"-()▁"),
            show_progress=False,
        ),
    )
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    vocabulary = [(piece, min(score, _PIECE_SCORE)) for piece, score in pieces if piece not in scores]
    vocabulary += [*scores.items(), *((f"<0x{value:02X}>", _BYTE_SCORE) for value in range(256))]
    tokenizer = _bare(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
    )
    return tokenizer


def _bare(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` reads."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=MAX_LENGTH,
        padding_side="right",
    ).save_pretrained(folder)
    # The one class name that every release of transformers knows.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, captions: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask (1 where there is a token), int64 [N, length] each; long captions keep their `</s>`."""
    ids = np.zeros((len(captions), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, encoding in enumerate(tokenizer.encode_batch(captions)):
        tokens = encoding.ids if len(encoding.ids) <= length else [*encoding.ids[: length - 1], 1]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask
