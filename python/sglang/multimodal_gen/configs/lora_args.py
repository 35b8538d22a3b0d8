"""The adapter that an engine starts with."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.multimodal_gen.configs.declare import LOCAL_ONLY, arg
from sglang.multimodal_gen.configs.sample.lora_params import MAX_SCALE, name_problem

LAUNCH_ID = "launch"
"""Under which workers know it."""
MERGE_MODES = ("auto", "merge", "dynamic")


@dataclass(frozen=True, kw_only=True)
class LoraArgs:
    """LoRA at launch; more are loaded with `set_lora`."""

    lora_path: str | None = arg(
        None,
        help="LoRA adapter to start with: a safetensors file, a directory, an `owner/name` of the hub, or "
        "`demo-outline` for the embedded model.",
        group="lora",
        unset="none",
        exposed=LOCAL_ONLY,
        max_length=4096,
        metavar="PATH",
    )
    lora_nickname: str = arg(
        "default",
        help="Name by which requests ask for it.",
        group="lora",
        exposed=LOCAL_ONLY,
        check=name_problem,
        metavar="NAME",
    )
    lora_scale: float = arg(
        1.0, help="How much it counts.", group="lora", exposed=LOCAL_ONLY, minimum=-MAX_SCALE, maximum=MAX_SCALE
    )
    lora_alpha: float | None = arg(
        None,
        help="Alpha in place of the file's; an update counts alpha / rank.",
        group="lora",
        unset="the file's",
        exposed=LOCAL_ONLY,
        minimum=0.0,
        maximum=1e6,
    )
    lora_weight_name: str | None = arg(
        None,
        help="File of the directory or the repository, where it holds several.",
        group="lora",
        unset="the usual one, or the only one",
        exposed=LOCAL_ONLY,
        max_length=512,
        metavar="FILE",
    )
    lora_merge_mode: str = arg(
        "auto",
        help="`dynamic` computes it beside the weights, so that each request may have others; `merge` makes it part of "
        "the weights of all requests, which costs nothing per step; `auto` is dynamic.",
        group="lora",
        exposed=LOCAL_ONLY,
        choices=MERGE_MODES,
    )
