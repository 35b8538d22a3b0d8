"""The embedded adapter draws outlines of what the embedded model draws; others in the same batch stay as they are."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch

from demo_model.clips import render
from demo_model.scenes import sample_scenes
from sglang.multimodal_gen.registry import EMBEDDED_ADAPTERS
from sglang.multimodal_gen.runtime.loader.lora_files import LoraSource
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.pipeline_parity import relative_error, run_together
from train_demo_lora import fold_padding

(NAME,) = EMBEDDED_ADAPTERS
PROMPTS = ("a large red circle on a white background", "a blue square", "a large green star on a white background")
_SEEN = 60.0  # RGB distance from the background


def drawn(picture: np.ndarray) -> np.ndarray:
    """Where a picture [H, W, 3] is not background: [H, W]."""
    pixels = picture.astype(float)
    rim = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    return np.linalg.norm(pixels - np.median(rim, axis=0), axis=-1) > _SEEN


def middle_share(picture: np.ndarray) -> float:
    """How much of the middle of what is drawn is drawn itself."""
    there = drawn(picture)
    rows, columns = (np.flatnonzero(there.any(axis)) for axis in (1, 0))
    box = there[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = box.shape
    assert min(height, width) > 20, "an object is drawn"
    return float(box[height * 2 // 5 : height * 3 // 5, width * 2 // 5 : width * 3 // 5].mean())


def test_it_draws_outlines_beside_requests_that_are_drawn_as_ever() -> None:
    pipeline = build_pipeline("demo", ExecutionArgs(device="cpu", precision="fp32"))
    base: dict[str, Any] = {"num_frames": 1, "num_inference_steps": 12}
    plain = [base | {"prompt": prompt, "seed": seed} for seed, prompt in enumerate(PROMPTS)]
    outlined = [wish | {"lora": [NAME]} for wish in plain]
    pipeline.adapters.load(NAME, LoraSource(path=NAME))
    with torch.inference_mode():
        results = run_together(pipeline, [(wish, EMPTY) for wish in (*plain, *outlined)])
    shares = [middle_share(frames[0]) for _, frames in results]
    assert min(shares[: len(plain)]) > 0.95, shares
    assert max(shares[len(plain) :]) < 0.2, shares


def test_padding_that_is_folded_while_training_is_that_of_inference() -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32, "text_dim": 16}
    model = diffusers.WanTransformer3DModel(**sizes)
    latents, text = torch.randn(2, 16, 1, 8, 8), torch.randn(2, 64, 16)
    text[0, 10:], text[1, 60:] = 0, 0
    given = (latents, torch.tensor([500.0, 20.0]))
    with torch.no_grad():
        padded = model(*given, torch.nn.functional.pad(text, (0, 0, 0, 512 - 64)), return_dict=False)[0]
        unfolded = model(*given, text, return_dict=False)[0]
        fold_padding(model)
        folded = model(*given, text, return_dict=False)[0]
    assert relative_error(folded, padded) < 1e-5 < relative_error(unfolded, padded)


def test_outlines_have_the_shape_and_an_empty_middle() -> None:
    scenes = sample_scenes(np.random.default_rng(3), 12, video=False, two_share=0.0)
    solid, outlined = (render(scenes, num_frames=1, outline=outline).numpy() for outline in (None, 4.0))
    for whole, line in zip(solid[:, 0] * 255, outlined[:, 0] * 255, strict=True):
        assert middle_share(whole) == 1.0 and middle_share(line) < 0.5
        assert (drawn(line) <= drawn(whole)).all()
        rows, columns = (np.flatnonzero(drawn(whole).any(axis)) for axis in (1, 0))
        assert drawn(line)[rows[0]].any() and drawn(line)[:, columns[-1]].any()
