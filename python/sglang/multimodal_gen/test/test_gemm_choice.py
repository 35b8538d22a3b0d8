"""Products by measured algorithms, with a library that computes on the CPU in place of a GPU's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.runtime.distributed.parallel_state import SINGLE, ProcessAxis
from sglang.multimodal_gen.runtime.layers import gemm_choice
from sglang.multimodal_gen.runtime.layers.gemm_choice import (
    FEWEST_TOKENS,
    TOKEN_STEP,
    GemmChoices,
    GemmEntry,
    chosen_product,
    gemm_choices,
    in_turns,
    use_gemm_choices,
    usual_product,
)
from sglang.multimodal_gen.runtime.layers.gemm_kernels import GemmNotAvailable, GemmShape
from sglang.multimodal_gen.runtime.layers.linear import ReplicatedLinear
from sglang.multimodal_gen.runtime.layers.measured_file import MeasuredFile
from sglang.multimodal_gen.runtime.layers.quantization.products import multiply_into
from sglang.multimodal_gen.runtime.pipelines.flux import FluxPipeline
from sglang.multimodal_gen.runtime.pipelines_core import composed_pipeline_base
from sglang.multimodal_gen.runtime.pipelines_core.placement import place
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.tiny_wan import noise

CPU = torch.device("cpu")
WIDTH = 8


class Library:
    """Algorithms "0", "1" …, whose products are right, and which say that they were called."""

    version = "1"

    def __init__(self, count: int = 3, *, unable: dict[str, int] | None = None) -> None:
        """`unable`: the largest number of tokens that an algorithm can do."""
        self.count = count
        self.unable = unable or {}
        self.called: list[str] = []

    def candidates(self, shape: GemmShape) -> list[str]:
        return [str(number) for number in range(self.count)]

    def gemm(self, shape: GemmShape, algorithm: str) -> Callable[..., Tensor]:
        def run(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
            if len(inputs) > self.unable.get(algorithm, len(inputs)):
                raise GemmNotAvailable("NOT_SUPPORTED")
            self.called.append(algorithm)
            product = usual_product(inputs, weight, bias, gelu=shape.gelu)
            return product if out is None else out.copy_(product)

        return run


class Clock:
    """The seconds that torch's choice and then each algorithm take, and how often that was asked."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = list(seconds)
        self.num_asked = 0

    def __call__(self, runs: Sequence[Callable[[], Tensor]]) -> list[float]:
        self.num_asked += 1
        assert len(runs) == len(self.seconds)
        return self.seconds


@pytest.fixture(autouse=True)
def _small_products_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gemm_choice, "FEWEST_FLOPS", 1)
    with torch.no_grad():
        yield
    use_gemm_choices(None)


def in_use(library: Library, clock: Clock | None, entries: Sequence[GemmEntry] = (), **more: Any) -> GemmChoices:
    choices = GemmChoices(library, entries, measure=clock, **more)
    use_gemm_choices(choices)
    return choices


def operands(tokens: int = FEWEST_TOKENS, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    return noise(tokens, WIDTH).to(dtype), noise(12, WIDTH, seed=1).to(dtype), noise(12, seed=2).to(dtype)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_fastest_is_measured_once_and_computes(with_bias: bool, gelu: bool) -> None:
    library, clock = Library(), Clock(1.0, 0.9, 0.5, 0.7)
    kept: list[GemmEntry] = []
    choices = in_use(library, clock, keep=kept.extend)
    inputs, weight, bias = operands()
    chosen_bias = bias if with_bias else None
    for _ in range(3):
        found = chosen_product(inputs.unflatten(0, (2, -1)), weight, chosen_bias, gelu=gelu)
        assert found is not None
        expected = F.linear(inputs, weight, chosen_bias)
        expected = F.gelu(expected, approximate="tanh") if gelu else expected
        torch.testing.assert_close(found.flatten(0, 1), expected, rtol=2e-2, atol=2e-2)
    assert library.called == ["0", "1", "2", *["1"] * 3] and clock.num_asked == 1
    [entry] = kept
    assert (entry.algorithm, entry.seconds, entry.usual_seconds) == ("1", 0.5, 1.0)
    assert choices.entries == {entry.shape: entry}
    assert (entry.shape.bias, entry.shape.gelu, entry.shape.tokens) == (with_bias, gelu, FEWEST_TOKENS)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_chosen", [False, True])
def test_a_product_goes_where_it_is_told_to(is_chosen: bool, with_bias: bool) -> None:
    library = Library()
    in_use(library, Clock(1.0, 0.5, 0.6, 0.7) if is_chosen else None)
    inputs, weight, bias = operands()
    room = torch.full((FEWEST_TOKENS + 2, 12), torch.nan, dtype=torch.bfloat16)
    multiply_into(inputs, weight, bias if with_bias else None, room[1:-1])
    assert torch.equal(room[1:-1], F.linear(inputs, weight, bias if with_bias else None))
    assert room[[0, -1]].isnan().all() and library.called[-1:] == ["0"] * is_chosen


def test_layers_multiply_by_it() -> None:
    library = Library()
    in_use(library, Clock(1.0, 0.5, 0.6, 0.7))
    layer = ReplicatedLinear(WIDTH, 12).to(torch.bfloat16)
    inputs, _, _ = operands()
    assert torch.equal(layer(inputs), F.linear(inputs, layer.weight, layer.bias))
    assert library.called[-1] == "0"


@pytest.mark.parametrize("seconds", [(1.0, 0.99, 1.2, 1.1), (1.0, 1.0, 1.0, 1.0), (0.5, 1.0, 1.0, 1.0)])
def test_without_a_gain_the_usual_choice_serves(seconds: tuple[float, ...]) -> None:
    library, clock = Library(), Clock(*seconds)
    choices = in_use(library, clock)
    for _ in range(2):
        assert chosen_product(*operands()) is None
    assert library.called == ["0", "1", "2"] and clock.num_asked == 1, "each was tried once"
    [entry] = choices.entries.values()
    assert entry.algorithm == "" and entry.seconds == entry.usual_seconds == seconds[0]


def test_an_algorithm_that_cannot_run_is_none() -> None:
    library = Library(4, unable={"0": 0})
    choices = in_use(library, Clock(1.0, 0.9, 0.5, 0.7))
    assert chosen_product(*operands()) is not None
    assert [entry.algorithm for entry in choices.entries.values()] == ["2"]


def test_one_that_fails_later_leaves_it_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    library = Library(unable={"0": FEWEST_TOKENS + 1})
    in_use(library, Clock(1.0, 0.5, 0.6, 0.7))
    assert chosen_product(*operands(FEWEST_TOKENS + 1)) is not None
    for _ in range(2):
        assert chosen_product(*operands(FEWEST_TOKENS + 2)) is None
    [record] = caplog.records
    assert "goes by torch's choice: NOT_SUPPORTED" in record.getMessage()


def test_a_library_without_candidates_leaves_the_usual_choice() -> None:
    in_use(Library(0), Clock(1.0))
    assert chosen_product(*operands()) is None


def test_numbers_of_tokens_share_an_algorithm_up_to_the_next_step() -> None:
    clock = Clock(1.0, 0.5, 0.6, 0.7)
    in_use(Library(), clock)
    for tokens in (FEWEST_TOKENS + 1, FEWEST_TOKENS + 2, FEWEST_TOKENS + TOKEN_STEP):
        inputs, weight, bias = operands(tokens)
        found = chosen_product(inputs, weight, bias)
        assert found is not None and torch.equal(found, F.linear(inputs, weight, bias))
    assert clock.num_asked == 1
    assert chosen_product(*operands(FEWEST_TOKENS + TOKEN_STEP + 1)) is not None
    assert clock.num_asked == 2


def test_what_is_known_is_not_measured_and_what_is_not_only_where_it_may_be() -> None:
    library = Library()
    choices = in_use(library, Clock(1.0, 0.5, 0.6, 0.7))
    chosen_product(*operands())
    known = list(choices.entries.values())
    in_use(library, None, known)
    library.called.clear()
    assert chosen_product(*operands()) is not None and library.called == ["0"]
    assert chosen_product(*operands(4 * FEWEST_TOKENS)) is None, "nobody may measure"
    monkey = in_use(library, Clock(1.0, 0.5, 0.6, 0.7))
    monkey._seconds_left = 0.0
    assert chosen_product(*operands()) is None, "no time is left for it"


def test_measuring_ends_when_its_time_is_up() -> None:
    """A server that is sent ever new sizes goes on."""
    clock = Clock(2.0, 0.5, 0.6, 0.7)  # four runs of two seconds, four times
    in_use(Library(), clock)
    for number in range(4):
        chosen_product(*operands(FEWEST_TOKENS + number * TOKEN_STEP))
    assert clock.num_asked == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x.float(), w.float(), b.float()),
        lambda x, w, b: (x[: FEWEST_TOKENS - 1], w, b),
        lambda x, w, b: (x.t().contiguous().t(), w, b),
        lambda x, w, b: (x, w.t().contiguous().t(), b),
        lambda x, w, b: (x, w, b.float()),
    ],
    ids=["fp32", "few tokens", "strided inputs", "strided weight", "wide bias"],
)
def test_other_products_stay_as_they_are(change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    clock = Clock(1.0, 0.5, 0.6, 0.7)
    in_use(Library(), clock)
    assert chosen_product(*change(*operands())) is None and clock.num_asked == 0


def test_small_products_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_choice, "FEWEST_FLOPS", 2 * FEWEST_TOKENS * WIDTH * 12 + 1)
    in_use(Library(), Clock(1.0, 0.5, 0.6, 0.7))
    assert chosen_product(*operands()) is None
    assert chosen_product(*operands(2 * FEWEST_TOKENS)) is not None


def test_gradients_go_the_usual_way() -> None:
    library = Library()
    in_use(library, Clock(1.0, 0.5, 0.6, 0.7))
    layer = nn.Sequential(ReplicatedLinear(WIDTH, 12)).to(torch.bfloat16)
    with torch.enable_grad():
        layer(operands()[0]).float().sum().backward()
    assert library.called == [] and layer[0].weight.grad is not None


def test_a_part_of_a_weight_is_a_shape_of_its_own() -> None:
    clock = Clock(1.0, 0.5, 0.6, 0.7)
    choices = in_use(Library(), clock)
    inputs, weight, bias = operands()
    whole = torch.cat((weight, weight), dim=1)
    for part in (weight, whole[:, :WIDTH]):
        found = chosen_product(inputs, part, bias)
        assert found is not None and torch.equal(found, F.linear(inputs, part, bias))
    assert clock.num_asked == 2
    assert [shape.weight_stride for shape in choices.entries] == [WIDTH, 2 * WIDTH]


def test_entries_survive_in_a_file(tmp_path: Path) -> None:
    choices = in_use(Library(), Clock(1.0, 0.5, 0.6, 0.7))
    chosen_product(*operands())
    entries = tuple(choices.entries.values())
    file = MeasuredFile(tmp_path, "gemm", GemmEntry, {"device": "NVIDIA H100"}, schema_version=1)
    file.write(entries)
    assert file.read() == (entries, "")
    other = MeasuredFile(tmp_path, "gemm", GemmEntry, {"device": "NVIDIA H200"}, schema_version=1)
    assert other.path != file.path and other.read() == ((), "")


def test_times_are_of_one_run_and_in_the_order_of_the_runs() -> None:
    def wait(count: int) -> Callable[[], Tensor]:
        matrix = torch.ones(128, 128)

        def run() -> Tensor:
            for _ in range(count):
                matrix @ matrix
            return matrix

        return run

    short, long = in_turns([wait(20), wait(200)], CPU)
    assert 0 < 2 * short < long


def test_a_cpu_has_no_choices() -> None:
    assert gemm_choices(CPU, SINGLE, Path("unused"), report=pytest.fail) is None


class _OfAGpu:
    type = "cuda"


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_process_alone_measures_and_keeps_what_it_found(
    num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library()
    monkeypatch.setattr(gemm_choice, "CublasLt", lambda: library)
    monkeypatch.setattr(gemm_choice, "device_identity", lambda device: {"device": "NVIDIA H100"})
    monkeypatch.setattr(gemm_choice, "in_turns", lambda runs, device: [1.0, 0.5, 0.6, 0.7])
    parallel = SINGLE if num_ranks == 1 else dataclasses.replace(SINGLE, world=ProcessAxis(size=num_ranks))
    choices = gemm_choices(_OfAGpu(), parallel, tmp_path, report=pytest.fail)  # type: ignore[arg-type]
    use_gemm_choices(choices)
    assert (chosen_product(*operands()) is not None) == (num_ranks == 1)
    again = gemm_choices(_OfAGpu(), parallel, tmp_path, report=pytest.fail)  # type: ignore[arg-type]
    assert again is not None and choices is not None and again.entries == choices.entries
    assert len(again.entries) == (1 if num_ranks == 1 else 0)


def test_without_the_bindings_torch_chooses_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Library:
        raise ModuleNotFoundError("No module named 'nvmath'")

    monkeypatch.setattr(gemm_choice, "CublasLt", missing)
    heard: list[str] = []
    assert gemm_choices(_OfAGpu(), SINGLE, Path("unused"), report=heard.append) is None  # type: ignore[arg-type]
    assert heard == ["products run by torch's choice: cuBLASLt cannot be had (ModuleNotFoundError)"]


@pytest.mark.parametrize(
    ("wishes", "is_on"), [({}, True), ({"enable_gemm_autotune": False}, False), ({"deterministic": True}, False)]
)
def test_options_turn_it_off(wishes: dict[str, Any], is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = GemmChoices(Library(), (), measure=None)
    monkeypatch.setattr(composed_pipeline_base, "gemm_choices", lambda *_, **__: made)
    use_gemm_choices(GemmChoices(Library(), (), measure=None))
    execution = ExecutionArgs(device="cpu", **wishes)
    FluxPipeline.load_context(PipelineConfig(), place(execution), execution)
    assert gemm_choice._in_use is (made if is_on else None)
