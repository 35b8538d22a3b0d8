"""`bench attention`: every kernel of this device at the shapes of one's own, of a model, or of all published models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sglang.multimodal_gen.configs.model_outline import ModelOutline, outline_of
from sglang.multimodal_gen.configs.published import published_ids
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.bench.child import BenchChild
from sglang.multimodal_gen.runtime.bench.messages import AttentionCase, AttentionResult, AttentionTask
from sglang.multimodal_gen.runtime.managers.engine_config import EngineConfig
from sglang.multimodal_gen.runtime.server_args import ServerArgs

_WORKER = "sglang.multimodal_gen.runtime.bench.worker.attention"
_MOST_TOKENS_ON_CPU = 2048


def measure_attention(options: Mapping[str, Any], args: ServerArgs) -> AttentionResult:
    """The result for all cases. Raises ServingError saying what in the options does not fit."""
    task = AttentionTask(
        engine=EngineConfig.of_this_process(args, run_dir=""),
        cases=tuple(cases_of(options)),
        max_tokens=options["max_tokens"],
        max_tokens_on_cpu=options["max_tokens"] or _MOST_TOKENS_ON_CPU,
        kernels=options["kernels"],
        warmup_runs=options["warmup_runs"],
        repeats=options["repeats"],
        min_seconds=options["min_seconds"],
        save=options["save"],
    )
    with BenchChild(_WORKER, task) as child:
        return child.receive(AttentionResult)


def cases_of(options: Mapping[str, Any]) -> list[AttentionCase]:
    """What is to be measured, each shape once, under the names of all models that have it."""
    if options["queries"] is not None:
        own = AttentionCase(
            names=("as asked for",),
            batch_size=options["batch_size"],
            queries=options["queries"],
            keys=options["keys"] or options["queries"],
            heads=options["heads"],
            head_dim=options["head_dim"],
            masked=options["masked"],
        )
        return [own]
    found: dict[tuple[int, ...], list[str]] = {}
    for model in options["models"] or published_ids():
        outline = outline_of(get_model_info(model))
        for role, *shape in _shapes(outline):
            names = found.setdefault(tuple(shape), [])
            names.append(f"{model} {role}")
    return [
        AttentionCase(
            names=tuple(names), batch_size=batch_size, queries=queries, keys=keys, heads=heads, head_dim=head_dim
        )
        for (batch_size, queries, keys, heads, head_dim), names in found.items()
    ]


def _shapes(outline: ModelOutline) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Role, rows, query tokens, key tokens, heads and head size, of a step of a request with the model's defaults."""
    work, shape = outline.work(), outline.shape
    tokens = {
        "image": work.image_tokens,
        "joint": work.image_tokens + work.text_tokens,
    }
    heads = (shape.num_heads, shape.head_dim)
    attentions = dict.fromkeys(segment for run in shape.runs for segment in run.attentions if segment in tokens)
    for segment in attentions:
        yield "self", work.rows, tokens[segment], tokens[segment], *heads
    if any(run.crosses for run in shape.runs):
        yield "cross", work.rows, work.image_tokens, work.text_tokens, *heads
