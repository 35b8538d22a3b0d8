"""The model of costs against modules on the meta device, and against what was measured on GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang.multimodal_gen.configs import cost_model
from sglang.multimodal_gen.configs.cost_model import (
    H100,
    MOST_GRAPHED_TOKENS,
    NORM_SUM_LAUNCHES,
    NORM_SUM_TRAFFIC,
    RING_LAUNCHES,
    RING_STEP_LAUNCHES,
    StepWork,
    activation_bytes,
    link_seconds,
    step_cost,
)
from sglang.multimodal_gen.configs.models.base import TransformerConfig
from sglang.multimodal_gen.configs.published import published_ids
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.configs.transformer_shape import TransformerShape
from sglang.multimodal_gen.registry import get_model_info, load_config
from sglang.multimodal_gen.runtime.distributed.parallel_state import ALONE, ProcessAxis
from sglang.multimodal_gen.runtime.layers import fused, norm
from sglang.multimodal_gen.runtime.layers.attention import layouts
from sglang.multimodal_gen.runtime.layers.mlp import SwiGLU
from sglang.multimodal_gen.runtime.loader.component_loader import NativeModule
from sglang.multimodal_gen.runtime.pipelines_core import find_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.workload import Drawing, WorkSize
from sglang.multimodal_gen.runtime.server_args import ModelArgs
from sglang.multimodal_gen.test.measured_steps import (
    FLUX,
    MEASURED,
    WAN_1_3B,
    WAN_14B,
    Z_IMAGE,
    Measured,
    published_outline,
    table,
)

_DOCS = Path(__file__).parents[4] / "docs"
_GIB = 2**30


def _native(hub_id: str) -> tuple[NativeModule, Any, Any]:
    """What loads the transformer, the pipeline's class, and the configs of its native components."""
    resolved, pipeline_class = find_pipeline(ModelArgs(model_path=hub_id, random_weights=True))
    assert resolved.local_path is not None
    directory = resolved.local_path
    natives = {n: load for n, load in pipeline_class.components.items() if isinstance(load, NativeModule)}
    configs = {n: load.config(directory / n) for n, load in natives.items() if (directory / n).is_dir()}
    return natives["transformer"], pipeline_class, configs


@pytest.mark.parametrize("hub_id", published_ids())
def test_parameters_are_counted_from_the_config_alone(hub_id: str) -> None:
    native, _, configs = _native(hub_id)
    with torch.device("meta"):
        module = native.module_class(configs["transformer"])  # type: ignore[call-arg]
    counted = sum(parameter.numel() for parameter in module.parameters())
    assert published_outline(hub_id).shape.num_parameters == pytest.approx(counted, rel=0.001)


def test_the_config_that_plans_is_the_one_that_the_pipeline_loads() -> None:
    for hub_id in published_ids():
        native, _, _ = _native(hub_id)
        entry = get_model_info(hub_id).entry
        assert entry is not None
        assert load_config(entry).transformer is native.config_class, hub_id


_PRODUCTS = ("mm", "addmm", "bmm", "_addmm_activation")
_NO_KERNELS = ("detach", "empty", "empty_like", "new_empty", "_unsafe_view", "alias")


class _Counting(TorchDispatchMode):
    """Kernels, and bytes that those other than matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_KERNELS:
            self.add(*(() if name in _PRODUCTS else tree_leaves((args, kwargs, made))))
        return made

    def add(self, *tensors: object) -> None:
        """A kernel that reads or writes each of these once."""
        self.launches += 1
        self.bytes += sum(map(_bytes_of, tensors))


def _bytes_of(leaf: object) -> int:
    """Without what is repeated by a stride of zero."""
    if not isinstance(leaf, Tensor):
        return 0
    numbers = leaf.element_size()
    for size, stride in zip(leaf.shape, leaf.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers


class _FusedKernels:
    """Stands in for `triton_kernels`, which would want a GPU: results without values, and one kernel counted."""

    def __init__(self, counting: _Counting) -> None:
        self.counting = counting

    def sum_norm(
        self, residual: Tensor, update: Tensor | None, *parts: Tensor | None, norm: bool, **options: Any
    ) -> tuple[Tensor, Tensor]:
        summed = residual if update is None else residual.new_empty(residual.shape)
        normed = residual.new_empty(residual.shape) if norm else residual
        made = [tensor for tensor in (summed, normed) if tensor is not residual]
        read = [tensor for tensor in (residual, update, *parts) if tensor is not None]
        assert all(tensor.stride(-1) == 1 for tensor in read), "the kernel reads neighbouring features"
        self.counting.add(*read, *made)
        return summed, normed

    def norm_rotate(
        self,
        sources: Sequence[Tensor],
        weights: Sequence[Tensor] | None,
        table: Tensor | None,
        targets: Sequence[Tensor],
        **options: Any,
    ) -> None:
        self.counting.add(*sources, *(weights or ()), table, *targets)

    def gated_silu(self, gate: Tensor, value: Tensor) -> Tensor:
        product = gate.new_empty(gate.shape)
        self.counting.add(gate, value, product)
        return product


@contextlib.contextmanager
def _as_on_a_gpu(counting: _Counting, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the fused kernels; attention, which is reckoned apart, and a norm of torch's are one kernel each too."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        counting.add()
        return torch.empty_like(query)

    def rms_norm(hidden_states: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        normed = torch.empty_like(hidden_states)
        counting.add(hidden_states, weight, normed)
        return normed

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        patch.setattr(F, "rms_norm", rms_norm)
        patch.setattr(fused, "_serves", lambda tensor: True)
        patch.setattr(fused, "_kernels", lambda: _FusedKernels(counting))
        yield


def _counted(forward: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> _Counting:
    """What one forward takes once caches of tables are filled."""
    for _ in range(2):
        counting = _Counting()
        with torch.no_grad(), _as_on_a_gpu(counting, monkeypatch), counting:
            forward()
    return counting


def _as_loaded(native: NativeModule, config: TransformerConfig) -> torch.nn.Module:
    """Without weights; in the dtypes that a checkpoint is loaded in, its projections apart."""
    with torch.device("meta"):
        module: torch.nn.Module = native.module_class(config).to(torch.bfloat16)  # type: ignore[call-arg]
    kept = getattr(native.module_class, "keep_in_fp32", ())
    for name, parameter in module.named_parameters():
        if any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.float()
    return module


_LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    WAN_1_3B: ({"num_layers": 1}, {"num_layers": 2}),
    "Lightricks/LTX-Video": ({"num_layers": 1}, {"num_layers": 2}),
    FLUX: ({"num_layers": 1, "num_single_layers": 1}, {"num_layers": 2, "num_single_layers": 3}),
    "hunyuanvideo-community/HunyuanVideo": (
        {"num_layers": 1, "num_single_layers": 1},
        {"num_layers": 2, "num_single_layers": 3},
    ),
    "Qwen/Qwen-Image": ({"num_layers": 1}, {"num_layers": 2}),
    Z_IMAGE: ({"n_layers": 1}, {"n_layers": 2}),
    "stabilityai/stable-diffusion-3-medium-diffusers": ({"num_layers": 2}, {"num_layers": 3}),
    "stabilityai/stable-diffusion-3.5-large": ({"num_layers": 2}, {"num_layers": 3}),
    "stabilityai/stable-diffusion-3.5-medium": (
        {"num_layers": 3, "dual_attention_layers": (0,)},
        {"num_layers": 3, "dual_attention_layers": (0, 1)},
    ),
}
_SIZE = WorkSize(
    height=1024,
    width=1024,
    num_frames=1,
    latent_shape=(16, 1, 128, 128),
    batch_size=1,
    num_text_tokens=64,
    chunk_frames=1,
)


@pytest.mark.parametrize("hub_id", _LAYERS)
def test_kernels_and_traffic_of_a_block_are_as_declared(hub_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native, pipeline_class, configs = _native(hub_id)
    workload = pipeline_class.workloads["dit"]
    published: TransformerConfig = configs["transformer"]
    channels = getattr(published, "in_channels", 16)
    latents = channels if published.shape.patch[1] == 1 or channels <= 48 else 16
    size = dataclasses.replace(_SIZE, latent_shape=(latents, *_SIZE.latent_shape[1:]))
    found, declared = [], []
    for layers in _LAYERS[hub_id]:
        config = dataclasses.replace(published, **layers)
        module = _as_loaded(native, config)
        draw = Drawing(torch.device("meta"), torch.bfloat16)
        inputs = workload.prepared(module, workload.inputs({**configs, "transformer": config}, size, draw))
        for layer in module.modules():  # what an exchange does not take apart
            if isinstance(layer, SwiGLU):
                layer.join_projections()
        apart = _counted(lambda: workload.forward(module, inputs, size), monkeypatch)  # noqa: B023
        fused.join_projections(module)
        joined = _counted(lambda: workload.forward(module, inputs, size), monkeypatch)  # noqa: B023
        found.append((joined.launches, apart.launches - joined.launches, joined.bytes))
        declared.append(_declared(config.shape, inputs_tokens=_tokens(config.shape, size)))
    *launches, traffic = (after - before for before, after in zip(*found, strict=True))
    *declared_launches, declared_traffic = (after - before for before, after in zip(*declared, strict=True))
    assert launches == declared_launches
    assert traffic == pytest.approx(declared_traffic, rel=0.1)


def test_norms_over_tensor_parallel_ranks_are_as_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "all_reduce", lambda tensor, axis: tensor)
    tokens = torch.empty(1, 4096, 768, dtype=torch.bfloat16, device="meta")
    found = []
    for axis in (ALONE, ProcessAxis(size=2)):
        with torch.device("meta"):
            module = norm.RMSNorm(tokens.shape[-1] * axis.size, 1e-6, axis=axis).to(torch.bfloat16)
        counting = _counted(lambda: module(tokens), monkeypatch)  # noqa: B023
        found.append((counting.launches, counting.bytes / tokens.numel()))
    launches, traffic = (after - before for before, after in zip(*found, strict=True))
    assert launches == NORM_SUM_LAUNCHES
    assert traffic == pytest.approx(NORM_SUM_TRAFFIC, rel=0.02)


def _tokens(shape: TransformerShape, size: WorkSize) -> tuple[int, int]:
    _, frames, height, width = size.latent_shape
    patch_t, patch_h, patch_w = shape.patch
    return frames * height * width // (patch_t * patch_h * patch_w), size.num_text_tokens + shape.extra_text_tokens


def _declared(shape: TransformerShape, *, inputs_tokens: tuple[int, int]) -> tuple[int, int, float]:
    image, text = inputs_tokens
    launches, apart, traffic = 0, 0, 0.0
    for run in shape.runs:
        tokens = image * bool(run.image_weights) + (image + text) * bool(run.joint_weights)
        tokens += text * (bool(run.text_weights) and not run.crosses)
        launches += run.count * run.launches
        apart += run.count * run.launches_apart
        traffic += run.count * run.traffic * tokens * shape.width
    return launches, apart, traffic


@pytest.mark.parametrize("measured", MEASURED, ids=lambda measured: f"{measured.hub_id}-{measured.shape}")
def test_steps_are_reckoned_within_15_percent(measured: Measured) -> None:
    assert measured.reckoned_s() == pytest.approx(measured.seconds, rel=0.15)


def test_the_documentation_shows_the_same_table() -> None:
    assert table() in (_DOCS / "parallel.md").read_text(encoding="utf-8"), f"docs/parallel.md needs\n{table()}"


# Of one block on two H100: tokens, width, and milliseconds of an exchange of queries, keys and values, of the results,
# of a ring step and of a sum of activations.
_LINKS = [(32_760, 1536, (0.34, 0.16, 0.44, 0.40)), (4608, 3072, (0.13, 0.08, 0.18, 0.14))]


@pytest.mark.parametrize(("tokens", "width", "measured_ms"), _LINKS)
def test_exchanges_are_reckoned_within_20_percent(
    tokens: int, width: int, measured_ms: tuple[float, float, float, float]
) -> None:
    held = tokens / 2 * width * 2
    sent = (3 * held / 2, held / 2, 2 * held, 2 * held)  # half of each to the other rank; keys and values; all tokens
    assert [1000 * link_seconds(each, H100) for each in sent] == pytest.approx(measured_ms, rel=0.2)


@pytest.mark.parametrize(
    ("layout", "measured_gib"), [(ReplicaShape(), 33.1), (ReplicaShape(ulysses=2), 30.3), (ReplicaShape(tp=2), 19.4)]
)
def test_memory_of_a_step_is_reckoned_within_5_percent(layout: ReplicaShape, measured_gib: float) -> None:
    model = published_outline(WAN_14B)
    work = StepWork(rows=2, image_tokens=32_760, text_tokens=512)
    weights = model.weights().transformer_on_each(layout)
    assert (weights + activation_bytes(model.shape, work, layout)) / _GIB == pytest.approx(measured_gib, rel=0.05)


def test_a_step_round_the_ring_launches_as_many_kernels_as_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    part = torch.empty(1, 64, 2, 8, device="meta"), torch.empty(1, 2, 64, device="meta")
    merging = _counted(lambda: layouts._merged(*part, *part), monkeypatch)
    assert 1 + merging.launches == RING_STEP_LAUNCHES


def test_few_tokens_are_launched_at_once() -> None:
    """As a graph, for which the tokens of all rows on one rank count."""
    model = published_outline(FLUX)
    few, many = (StepWork(rows=rows, image_tokens=4096, text_tokens=512) for rows in (2, 3))
    assert 2 * 4608 <= MOST_GRAPHED_TOKENS < 3 * 4608
    assert step_cost(model.shape, few, ReplicaShape(), H100).host_s == 0
    assert step_cost(model.shape, many, ReplicaShape(), H100).host_s > 0
    assert step_cost(model.shape, many, ReplicaShape(ulysses=2), H100).host_s == 0


def test_more_is_launched_where_projections_are_apart_and_norms_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "MOST_GRAPHED_TOKENS", 0)
    hardware = dataclasses.replace(H100, exchange_launch_s=0.0)
    for hub_id, blocks, apart, shared in (
        (WAN_1_3B, 30, 30 * 3, 30 * 3 * NORM_SUM_LAUNCHES),
        (FLUX, 19 + 38, 0, 0),  # so few tokens that queries, keys and values stay one product
    ):
        model = published_outline(hub_id)
        shapes = (ReplicaShape(), ReplicaShape(ring=2), ReplicaShape(ulysses=2), ReplicaShape(tp=2))
        alone, *others = (step_cost(model.shape, model.work(), layout, hardware).host_s for layout in shapes)
        more = [(host - alone) / hardware.launch_s for host in others]
        assert more == pytest.approx([blocks * (RING_LAUNCHES + RING_STEP_LAUNCHES), apart, shared])


def test_what_a_request_passes_once_is_no_part_of_a_step() -> None:
    model = published_outline(Z_IMAGE)
    assert [run.once for run in model.shape.runs] == [False, True, False]
    without = dataclasses.replace(model.shape, runs=(model.shape.runs[0], model.shape.runs[2]))
    for layout in (ReplicaShape(), ReplicaShape(tp=2)):
        assert step_cost(model.shape, model.work(), layout, H100) == step_cost(without, model.work(), layout, H100)


def test_more_ranks_send_no_less_and_hold_no_more() -> None:
    model = published_outline(WAN_14B)
    work = model.work()
    for axis in ("cfg", "ring", "ulysses", "tp"):
        two, four = ReplicaShape(**{axis: 2}), ReplicaShape(**{axis: 4})
        assert (
            step_cost(model.shape, work, two, H100).sent_bytes
            <= 2 * step_cost(model.shape, work, four, H100).sent_bytes
        )
        assert activation_bytes(model.shape, work, four) <= activation_bytes(model.shape, work, two)
        assert model.weights().transformer_on_each(four) <= model.weights().transformer_on_each(two)
