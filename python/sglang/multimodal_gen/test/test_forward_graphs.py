"""Forwards by graphs: equal to those without, whatever changes between them, and only where they are short."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.cost_model import MOST_GRAPHED_TOKENS
from sglang.multimodal_gen.runtime.layers import forward_graphs
from sglang.multimodal_gen.runtime.layers.attention.switch import AttentionSwitch
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRunner
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.layers.forward_graphs import (
    LEFT_ALONE,
    MOST_GRAPHS,
    ForwardGraphs,
    forget_graphs,
    graph_input_bytes,
)
from sglang.multimodal_gen.runtime.layers.lora import SlotUse
from sglang.multimodal_gen.runtime.layers.table_cache import table_cache
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline, composed_pipeline_base
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.pipeline_parity import run_together
from sglang.multimodal_gen.test.recorded_graph import RecordedGraph, record
from sglang.multimodal_gen.test.tiny_families import FAMILIES
from sglang.multimodal_gen.test.tiny_flux import TINY_FLUXES, save_tiny_flux


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_the_same_by_graphs(family: str, tmp_path: Path) -> None:
    """Two batches after another, of prompts of other lengths, so that what was captured meets other inputs."""
    save, values = FAMILIES[family]
    pipeline = build_pipeline(str(save(tmp_path)), ExecutionArgs(device="cpu", precision="fp32"))
    base = {"width": 64, "height": 64, "max_sequence_length": 16, "num_inference_steps": 4} | values
    prompts = [("a red circle", 3), ("a blue star and a small square", 4)], [("green", 5), ("two long white lines", 6)]

    def latents() -> list[Tensor]:
        found = []
        for batch in prompts:
            wishes = [(base | {"prompt": prompt, "seed": seed}, EMPTY) for prompt, seed in batch]
            with torch.inference_mode():
                found += [req.latents for req, _ in run_together(pipeline, wishes)]
        return found

    expected = latents()
    transformers = [module for name, module in pipeline.modules.items() if name.startswith("transformer") and module]
    for module in transformers:
        module.forward = ForwardGraphs(module, record)
    found = latents()
    assert sum(module.forward.num_graphs for module in transformers) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    forget_graphs(transformers)
    assert not any(module.forward.num_graphs for module in transformers)


@table_cache(maxsize=1)
def table_of(length: int) -> Tensor:
    """Numbers that a graph reads."""
    return torch.arange(length, dtype=torch.float32).add(1.0)


class Scaled(nn.Module):
    """Its output depends on a tensor, a table and a number, and it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        context = LayerContext()
        self.tokens = context.tokens
        self.block_runner = BlockRunner(context, num_blocks=1, changes_text=False)
        self.calls = 0

    def forward(self, tokens: Tensor, factor: int = 1, lengths: Sequence[int] = (), options: object = None) -> Tensor:
        """[B, S] -> [B, S]."""
        self.calls += 1
        self.tokens.begin(tokens.shape[1])
        return tokens * table_of(tokens.shape[1]) * factor + sum(lengths)


@pytest.fixture
def scaled() -> Any:
    """One that runs by graphs, without gradients."""
    module = Scaled()
    module.forward = ForwardGraphs(module, record)  # type: ignore[method-assign]
    with torch.inference_mode():
        yield module


def test_the_second_call_captures_and_later_ones_replay(scaled: Any) -> None:
    for number in range(1, 6):
        tokens = torch.full((2, 3), float(number))
        assert torch.equal(scaled(tokens), tokens * table_of(3))
        assert scaled.calls == min(number, 2)


def test_results_stay_what_they_were_when_a_graph_runs_again(scaled: Any) -> None:
    results = [scaled(torch.full((1, 2), float(number))) for number in range(4)]
    assert [float(result[0, 0]) for result in results] == [0.0, 1.0, 2.0, 3.0]


def test_whatever_is_no_tensor_is_part_of_the_key(scaled: Any) -> None:
    ones = torch.ones(1, 2)
    for _ in range(3):
        assert float(scaled(ones)[0, 0]) == 1.0
        assert float(scaled(ones, 3)[0, 0]) == 3.0
        assert float(scaled(ones, factor=2)[0, 0]) == 2.0
        assert float(scaled(ones, lengths=[1, 4])[0, 0]) == 6.0
        assert scaled(torch.ones(1, 4)).shape == (1, 4)
        assert scaled(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64
    assert scaled.forward.num_graphs == 6


def test_what_cannot_be_compared_runs_without_a_graph(scaled: Any) -> None:
    for _ in range(3):
        assert float(scaled(torch.ones(1, 2), options={1, 2})[0, 0]) == 1.0
    assert scaled.calls == 3


def test_tables_live_as_long_as_their_graphs(scaled: Any) -> None:
    """The cache of one table forgets it when another size comes; the graph goes on reading its own."""
    for _ in range(2):
        scaled(torch.ones(1, 3))
    [captured] = scaled.forward._graphs.values()
    own = table_of(3)
    table_of(5)
    assert table_of(3) is not own and any(kept is own for kept in captured.kept)


def test_long_forwards_and_those_with_gradients_are_not_captured(scaled: Any) -> None:
    for _ in range(3):
        scaled(torch.ones(2, MOST_GRAPHED_TOKENS // 2 + 1))
    assert scaled.forward.num_graphs == 0
    scaled(torch.ones(2, MOST_GRAPHED_TOKENS // 2))
    scaled(torch.ones(2, MOST_GRAPHED_TOKENS // 2))
    assert scaled.forward.num_graphs == 1
    with torch.inference_mode(False), torch.enable_grad():
        calls = scaled.calls
        scaled(torch.ones(2, MOST_GRAPHED_TOKENS // 2))
        assert scaled.calls == calls + 1


def test_graphs_share_places_of_equal_inputs(scaled: Any) -> None:
    """And no input of a call shares another's."""
    for number in range(1, 4):
        for factor in (1, 2):
            tokens = torch.full((1, 3), float(number))
            assert torch.equal(scaled(tokens, factor), factor * tokens * table_of(3))
    captured = list(scaled.forward._graphs.values())
    assert len(captured) == 2 and captured[0].inputs[0] is captured[1].inputs[0]
    assert graph_input_bytes([scaled, None, nn.Linear(1, 1)]) == 3 * 4
    first, second = scaled.forward._placed([torch.zeros(1, 3), torch.ones(1, 3)])
    assert first is captured[0].inputs[0]
    assert not first.any() and bool(second.all())
    scaled.forward.clear()
    del captured, first, second
    assert scaled.forward.input_bytes == 0


def test_forwards_that_are_given_much_are_not_captured(scaled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_graphs, "MOST_INPUT_BYTES", 4 * 7)
    for tokens in (7, 8):
        for _ in range(2):
            scaled(torch.ones(1, tokens))
    assert scaled.forward.num_graphs == 1 and scaled.forward.input_bytes == 4 * 7


def test_places_of_inputs_are_no_memory_for_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = build_pipeline(str(save_tiny_flux(tmp_path, TINY_FLUXES["dev"])), ExecutionArgs(device="cpu"))
    used = 0
    monkeypatch.setattr(pipeline.meter, "allocated_bytes", lambda: pipeline._loaded_bytes + used)
    monkeypatch.setattr(composed_pipeline_base, "free_bytes", lambda _: 10_000)
    assert pipeline.free_bytes() == 10_000
    used = 500  # of a request, which give it back
    assert pipeline.free_bytes() == 10_500
    graphs = pipeline.transformer.forward = ForwardGraphs(pipeline.transformer, record)
    places = graphs._placed([torch.ones(100)])
    assert pipeline.free_bytes() == 10_100 and places


def test_forwards_with_step_caches_or_adapters_are_computed(scaled: Any) -> None:
    runner = scaled.block_runner
    for _ in range(3):
        scaled(torch.ones(1, 2))
    with runner.using([object()]):
        scaled(torch.ones(1, 2))
    with runner.adapters.using([[SlotUse(1, 1.0)]], torch.device("cpu")):
        scaled(torch.ones(1, 2))
    assert scaled.calls == 4
    scaled(torch.ones(1, 2))
    assert scaled.calls == 4


def of_size(scaled: Any, size: int) -> bool:
    """One forward; whether it ran by a graph that was there."""
    calls = scaled.calls
    scaled(torch.ones(1, size))
    return bool(scaled.calls == calls)


def test_graphs_used_longest_ago_go_first(scaled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_graphs, "LEFT_ALONE", 1)
    for size in range(1, MOST_GRAPHS + 2):
        assert not of_size(scaled, size) and not of_size(scaled, size)
    assert scaled.forward.num_graphs == MOST_GRAPHS
    assert of_size(scaled, MOST_GRAPHS + 1)
    assert not of_size(scaled, 1), "captured anew"
    assert of_size(scaled, 1)


def test_of_many_sizes_in_turns_some_run_without_a_graph(scaled: Any) -> None:
    """Each would push out the next one's, and capturing takes longer than running."""
    sizes = range(1, MOST_GRAPHS + 3)
    for _ in range(3):
        found = [of_size(scaled, size) for size in sizes]
    assert found == [True] * MOST_GRAPHS + [False] * 2
    for _ in range(LEFT_ALONE):
        of_size(scaled, 1)
    assert not of_size(scaled, MOST_GRAPHS + 1), "now in place of one that is no longer used"
    assert of_size(scaled, MOST_GRAPHS + 1) and of_size(scaled, 1)
    for _ in range(2):
        found = [of_size(scaled, size) for size in sizes]
    assert scaled.forward.num_graphs == sum(found) == MOST_GRAPHS, "at rest again"


def test_a_forward_that_cannot_be_captured_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Callable[[], Tensor]) -> tuple[RecordedGraph, Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    module = Scaled()
    module.forward = ForwardGraphs(module, refuse)  # type: ignore[method-assign]
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        for number in range(4):
            assert float(module(torch.full((1, 2), float(number)))[0, 0]) == number
    assert module.forward.failure == "operation not permitted when stream is capturing"
    assert [record.message for record in caplog.records] == [
        "a forward of Scaled stays without a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_other_attention_kernels_are_another_graph(tmp_path: Path) -> None:
    pipeline = build_pipeline(
        str(save_tiny_flux(tmp_path, TINY_FLUXES["dev"])), ExecutionArgs(device="cpu", precision="fp32")
    )
    transformer = pipeline.modules["transformer"]
    transformer.forward = ForwardGraphs(transformer, record)
    switch = AttentionSwitch(transformer)
    assert list(transformer.forward._attentions) == switch._layers
    wish = {"prompt": "a", "seed": 1, "width": 64, "height": 64, "max_sequence_length": 16, "num_inference_steps": 3}
    with torch.inference_mode():
        run_together(pipeline, [(wish, EMPTY)])
    first = transformer.forward.num_graphs
    for layer in switch._layers:
        layer.kernel = copy.copy(layer.kernel)
    with torch.inference_mode():
        run_together(pipeline, [(wish, EMPTY)])
    assert transformer.forward.num_graphs > first
