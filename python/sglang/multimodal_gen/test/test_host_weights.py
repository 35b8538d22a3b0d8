"""Weights on the host: they come before their layers run, nobody overwrites them meanwhile, and the rest is as ever."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sglang.multimodal_gen.configs.memory_args import MemoryArgs
from sglang.multimodal_gen.errors import InsufficientMemory, InvalidValue, RemoteError
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import DiffGenerator, GenerationResult
from sglang.multimodal_gen.runtime.layers import host_weights
from sglang.multimodal_gen.runtime.layers.fused import JoinedLinear
from sglang.multimodal_gen.runtime.layers.host_weights import (
    HostLink,
    HostWeights,
    MovingRoom,
    SlotPool,
    compute_device,
    has_its_weights,
    held_tensors,
    packed_bytes,
)
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline, original_weights, residency
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.runtime.pipelines_core.residency import StreamedBlocks, refuse_wishes
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.lora_case import load_adapters, save_adapters
from sglang.multimodal_gen.test.pipeline_parity import admitted, run_together
from sglang.multimodal_gen.test.quantization_case import realigned
from sglang.multimodal_gen.test.tiny_families import FAMILIES, wish_of

CPU = torch.device("cpu")
_NOT_A_NUMBER = 0xFF


class StandInLink:
    """A device's transfers without one: a buffer is spoilt as soon as a copy may begin, and right once it is awaited.

    So layers that run too early, and buffers that are taken too early, compute with what is no number.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, HostWeights]] = []

    def send(self, weights: HostWeights, buffer: Tensor, after: Any) -> Any:
        """See Link."""
        assert after == "done"
        self.log.append(("send", weights))
        buffer.fill_(_NOT_A_NUMBER)
        return weights, buffer

    def wait(self, sent: Any) -> None:
        """See Link."""
        weights, buffer = sent
        self.log.append(("wait", weights))
        weights.copy_to(buffer)

    def mark(self) -> Any:
        """See Link."""
        return "done"


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[StandInLink]:
    """Those that pipelines make from now on."""
    made: list[StandInLink] = []

    def make() -> StandInLink:
        made.append(StandInLink())
        return made[-1]

    monkeypatch.setattr(residency, "HostLink", make)
    return made


class Product(nn.Module):
    """Two layers over one piece of memory, a buffer, and a table in another order of memory and another dtype."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(4, 2, bias=False), nn.Linear(4, 4, bias=False)
        for layer in (self.first, self.second):
            layer.weight.data = torch.randn(layer.weight.shape, generator=draw)
        self.joined = JoinedLinear((self.first, self.second))
        self.register_buffer("scale", torch.randn(3, generator=draw))
        self.table = nn.Parameter(torch.randn(5, 7, generator=draw).half().t())
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, 4] -> [B, 4]"""
        products = torch.cat((*self.joined(hidden), self.first(hidden), self.second(hidden)), dim=-1)
        return torch.tanh(products[:, :4] * self.scale.sum() + products[:, 4:].sum() + self.table.float().sum())


@pytest.mark.parametrize("keeps_files", [False, True])
def test_tensors_are_the_same_in_a_buffer_and_share_what_they_shared(keeps_files: bool) -> None:
    module = Product(1)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = held_tensors(module.modules())
    weights = HostWeights(tensors, keeps_files=keeps_files)
    assert weights.num_bytes == packed_bytes(tensors) >= sum(tensor.nbytes for tensor in tensors)
    buffer = torch.full((weights.num_bytes + 100,), _NOT_A_NUMBER, dtype=torch.uint8)
    weights.copy_to(buffer)
    weights.place(weights.views(buffer))
    start, stop = buffer.data_ptr(), buffer.data_ptr() + weights.num_bytes
    for name, tensor in module.state_dict().items():
        assert (torch.equal(tensor, before[name]) and tensor.stride() == before[name].stride()) or tensor.numel() == 0
        assert tensor.numel() == 0 or start <= tensor.data_ptr() < stop
    assert module.joined.weight.data_ptr() == module.first.weight.data_ptr()
    assert module.second.weight.data_ptr() - module.first.weight.data_ptr() == module.first.weight.nbytes
    weights.park()
    assert not start <= module.first.weight.data_ptr() < stop
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("most", [1, 3, 64, 1000, 10_000])
def test_parts_fit_and_are_the_whole(most: int) -> None:
    weights = HostWeights(held_tensors(Product(1).modules()), keeps_files=True)
    whole, found = (torch.zeros(weights.num_bytes, dtype=torch.uint8) for _ in range(2))
    weights.copy_to(whole)
    for begin, spans in weights.parts(most):
        staging = torch.zeros(most, dtype=torch.uint8)
        for span in spans:
            staging[span.offset - begin :][: len(span.source)].copy_(span.source)
        size = spans[-1].offset + len(spans[-1].source) - begin
        found[begin : begin + size].copy_(staging[:size])
    assert torch.equal(found, whole)


def streamed(count: int, *, num_slots: int) -> tuple[list[Product], StandInLink, list[HostWeights]]:
    """Layers that come through slots."""
    layers = [Product(seed) for seed in range(count)]
    link = StandInLink()
    weights = [HostWeights(held_tensors(layer.modules())) for layer in layers]
    pool = SlotPool(link, CPU, num_slots=num_slots, slot_bytes=weights[0].num_bytes)
    pool.follow(layers, weights)
    return layers, link, weights


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0], [0, 0, 3, 1, 1], [2]])
def test_layers_in_any_order_compute_with_their_own_weights(order: list[int], num_slots: int) -> None:
    layers, _, weights = streamed(5, num_slots=num_slots)
    plain = [Product(seed) for seed in range(5)]
    hidden = expected = torch.randn(2, 4)
    with torch.inference_mode():
        for _ in range(3):
            for number in order:
                hidden, expected = layers[number](hidden), plain[number](expected)
    assert torch.equal(hidden, expected) and hidden.isfinite().all()
    for layer, other in zip(layers, plain, strict=True):  # what they are outside of their turn
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    assert len(weights) == 5


def test_all_but_the_very_first_are_on_their_way_before_they_are_needed() -> None:
    layers, link, weights = streamed(6, num_slots=3)
    for _ in range(2):
        for layer in layers:
            layer(torch.randn(1, 4))
    sends = [index for index, (what, _) in enumerate(link.log) if what == "send"]
    late = [index for index in sends if ("wait", link.log[index][1]) in link.log[index + 1 : index + 2]]
    assert late == [0]
    assert [own for what, own in link.log if what == "wait"] == weights * 2
    # One was sent ahead of need at the end, for the next time.
    assert [own for what, own in link.log if what == "send"] == [*weights, *weights, *weights[:2]]


def test_what_runs_next_is_known_from_the_last_time() -> None:
    layers, link, weights = streamed(6, num_slots=2)
    order = [0, 3, 5, 1]
    for _ in range(2):
        for number in order:
            layers[number](torch.randn(1, 4))
    del link.log[:]
    for number in order:
        layers[number](torch.randn(1, 4))
    assert [weights.index(own) for what, own in link.log if what == "send"] == [3, 5, 1, 0]


def test_a_layer_that_fails_leaves_its_slot() -> None:
    layers, _, _ = streamed(4, num_slots=2)
    for _ in range(5):
        with pytest.raises(RuntimeError, match="shapes"):
            layers[1](torch.randn(1, 5))
    assert torch.equal(layers[2](torch.ones(1, 4)), Product(2)(torch.ones(1, 4)))


def test_components_take_turns_in_one_room() -> None:
    first, second = (nn.Sequential(Product(seed), Product(seed + 1)) for seed in (1, 5))
    room = MovingRoom(HostLink(), CPU)
    for component in (first, second):
        room.follow(component.modules(), HostWeights(held_tensors(component.modules())))
    on_host = first[0].first.weight.data_ptr()
    for _ in range(2):
        first[1](torch.ones(1, 4))  # any part of it
        there = first[0].first.weight.data_ptr()
        assert there != on_host and room.held_bytes == packed_bytes(held_tensors(first.modules()))
        first(torch.ones(1, 4))
        assert first[0].first.weight.data_ptr() == there
        second(torch.ones(1, 4))
        assert first[0].first.weight.data_ptr() == on_host
    room.clear()
    assert room.held_bytes == 0
    assert torch.equal(second[1].second.weight, Product(6).second.weight)


def test_what_blocks_share_stays_on_the_device() -> None:
    module = nn.Module()
    module.blocks = nn.ModuleList([Product(1), Product(2), Product(3)])
    module.blocks[1].table = module.blocks[2].table
    module.outside = nn.Linear(2, 2)
    module.outside.bias = module.blocks[0].empty
    found = StreamedBlocks.of("transformer", module)
    outside = {id(tensor) for tensor in found.outside}
    assert outside == {id(module.blocks[1].table), id(module.outside.weight), id(module.outside.bias)}
    assert not any(id(tensor) in outside for own in found.tensors for tensor in own)
    held = held_tensors(module.modules())
    assert len(held) == len(outside) + sum(map(len, found.tensors))


# --- pipelines ---


def latents_of(pipeline: Any, wishes: list[dict[str, Any]]) -> list[Any]:
    """Latents and frames of requests that share batches."""
    with torch.inference_mode():
        found = run_together(pipeline, [(wish, EMPTY) for wish in wishes])
    return [each for req, frames in found for each in (req.latents, torch.from_numpy(frames))]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    """To the bit."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


MODES = {
    "memory": MemoryArgs(performance_mode="memory"),
    "some blocks": MemoryArgs(
        component_residency=("all=component-offload", "dit=layerwise-offload"),
        dit_layerwise_resident_layers=1,
        dit_offload_prefetch_size=1,
        pin_cpu_memory=False,
    ),
}
CPU_FP32 = ExecutionArgs(device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The directory and what is made of it with all weights resident, by family."""
    made: dict[str, tuple[Path, list[Any]]] = {}

    def of(family: str) -> tuple[Path, list[Any]]:
        if family not in made:
            directory = FAMILIES[family][0](tmp_path_factory.mktemp(family))
            pipeline = realigned(build_pipeline(str(directory), CPU_FP32))
            made[family] = directory, latents_of(pipeline, wishes_of(family))
        return made[family]

    return of


def wishes_of(family: str) -> list[dict[str, Any]]:
    """Two requests that share a batch."""
    return [wish_of(family), wish_of(family, prompt="two long lines", seed=2)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_the_same(family: str, mode: str, checkpoints: Any, links: list[StandInLink]) -> None:
    directory, expected = checkpoints(family)
    lines: list[str] = []
    pipeline = build_pipeline(str(directory), CPU_FP32, memory=MODES[mode], report=lines.append)
    assert_equal(latents_of(pipeline, wishes_of(family)), expected)
    (link,) = links
    assert len(link.log) > 2 * 4 or (family, mode) == ("wan", "some blocks"), "blocks came in every step"
    assert any("transformer layerwise-offload" in line and "vae component-offload" in line for line in lines)
    for component in pipeline.modules.values():
        assert compute_device(component) == CPU
    pipeline.reclaim()
    assert pipeline.weight_room.present_bytes == 0
    assert_equal(latents_of(pipeline, wishes_of(family)), expected)


def test_a_request_that_is_too_large_hears_of_blocks_that_could_make_room(
    checkpoints: Any, links: list[StandInLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = checkpoints("flux")
    pipeline = build_pipeline(str(directory), CPU_FP32, memory=MODES["some blocks"])
    [req] = admitted(pipeline, [(wish_of("flux"), EMPTY)])
    needed = max(phase.peak_bytes + phase.held_bytes for phase in req.phases)
    kept = pipeline.weight_room.kept_bytes
    assert kept in StreamedBlocks.of("transformer", pipeline.transformer).sizes, "one block stays"
    for missing, can_help in ((kept, True), (kept + 1, False)):
        monkeypatch.setattr(pipeline, "budget_bytes", lambda missing=missing: needed - missing)
        monkeypatch.setattr(pipeline, "_budget_time", -math.inf)
        with pytest.raises(InsufficientMemory) as caught:
            admitted(pipeline, [(wish_of("flux"), EMPTY)])
        assert ("--performance-mode memory" in caught.value.message) is can_help


@pytest.mark.parametrize("method", ["fp8", "int8"])
@pytest.mark.parametrize("family", ["flux", "zimage"])
def test_quantised_weights_come_with_their_scales(
    family: str, method: str, checkpoints: Any, links: list[StandInLink]
) -> None:
    directory, expected = checkpoints(family)
    execution = ExecutionArgs(device="cpu", precision="fp32", quantization=method)
    resident = latents_of(build_pipeline(str(directory), execution), wishes_of(family))
    pipeline = build_pipeline(str(directory), execution, memory=MODES["memory"])
    assert_equal(latents_of(pipeline, wishes_of(family)), resident)
    assert links[0].log and not torch.equal(resident[0], expected[0])


def test_step_caches_and_a_lone_request_are_the_same(checkpoints: Any, links: list[StandInLink]) -> None:
    directory, _ = checkpoints("flux")
    wish = wish_of(
        "flux", num_inference_steps=8, enable_cache_dit=True, cache_dit_params={"residual_diff_threshold": 0.9}
    )
    expected = latents_of(build_pipeline(str(directory), CPU_FP32), [wish])
    pipeline = build_pipeline(str(directory), CPU_FP32, memory=MODES["memory"])
    assert_equal(latents_of(pipeline, [wish]), expected)
    assert links[0].log


@pytest.mark.parametrize("whole", [True, False])
def test_layers_of_a_component_that_comes_whole_can_run_by_themselves(
    whole: bool, checkpoints: Any, links: list[StandInLink]
) -> None:
    """So a request's texts and steps are embedded ahead of its forwards, as with resident weights."""
    directory, _ = checkpoints("flux")
    memory = MemoryArgs(component_residency=(f"dit={'component' if whole else 'layerwise'}-offload",))
    pipeline = build_pipeline(str(directory), CPU_FP32, memory=memory)
    transformer, room = pipeline.transformer, pipeline.weight_room
    transformer.runs_on = torch.device("meta")  # anywhere but where the weights wait
    assert has_its_weights(transformer) == whole
    assert room.present_bytes == 0
    with torch.inference_mode():
        transformer.embed_text(torch.zeros(1, 2, transformer.config.joint_attention_dim))
    assert (room.present_bytes > 0) == whole


@pytest.mark.parametrize("residency", ["all=component-offload", "all=layerwise-offload"])
def test_merged_adapters_reach_weights_on_the_host_and_leave_the_files(
    residency: str, checkpoints: Any, tmp_path: Path, links: list[StandInLink]
) -> None:
    """Also those of a transformer that is on the device, where it was last to run."""
    memory = MemoryArgs(
        component_residency=(residency, "vae=resident"), dit_layerwise_resident_layers=1, pin_cpu_memory=False
    )
    directory, expected = checkpoints("flux")
    before = files_of(directory)
    resident = build_pipeline(str(directory), CPU_FP32)
    offloaded = build_pipeline(str(directory), CPU_FP32, memory=memory)
    files = save_adapters(directory, tmp_path, {"wide": 9})
    changed = []
    for pipeline in (resident, offloaded):
        load_adapters(pipeline, files, merged={})
        named = latents_of(pipeline, [wish_of("flux", lora=[{"name": "wide", "scale": 0.7}])])
        pipeline.adapters.merge_ids([("wide", 0.7)])
        # A text that is new sends the transformer back to the host before it runs.
        new = latents_of(pipeline, [wish_of("flux", prompt="a text that is read first")])
        changed.append([*named, *new, *latents_of(pipeline, [wish_of("flux")])])
    assert_equal(changed[1], changed[0])
    assert not torch.equal(changed[1][-2], expected[0])
    offloaded.adapters.unmerge()
    assert_equal(latents_of(offloaded, wishes_of("flux")), expected)
    assert files_of(directory) == before


def files_of(directory: Path) -> dict[str, str]:
    """What is in the files of a checkpoint."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.rglob("*.safetensors"))
    }


# --- the engine ---


def test_an_engine_serves_with_its_weights_on_the_host(checkpoints: Any) -> None:
    directory, _ = checkpoints("flux")
    wish = wish_of("flux")
    _, frames = latents_of(build_pipeline(str(directory), CPU_FP32), [wish])
    options: dict[str, Any] = {"performance_mode": "memory", "device": "cpu", "precision": "fp32"}
    with DiffGenerator.from_pretrained(str(directory), **options) as generator:
        result = generator.generate(wish | {"return_frames": True})
    assert isinstance(result, GenerationResult) and result.frames is not None
    exact = np.round(frames.numpy() * 255) if frames.is_floating_point() else frames.numpy()
    assert np.abs(result.frames.astype(int) - exact.reshape(result.frames.shape).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_limit": 1.0}, r"gpu_memory_limit: got 1.0, accepted is at least \d"),
        ({"gpu_memory_limit": 1.0}, "the least that demo needs at its default size with"),
        (
            {"gpu_memory_limit": 1.0, "warmup_resolutions": ["32x96", "64x64"], "warmup_num_frames": 5},
            "the least that demo needs at 64x64, 5 frames with",
        ),
        ({"component_residency": ["vea=resident"]}, "component_residency: got vea, accepted is one of dit"),
    ],
)
def test_what_cannot_be_ends_the_start_with_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RemoteError, match=message):
        DiffGenerator.from_pretrained("demo", device="cpu", **options)


@pytest.mark.parametrize("options", [{"performance_mode": "memory"}, {"vae_cpu_offload": True}])
def test_a_pipeline_that_diffusers_runs_takes_no_such_wish(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InvalidValue, match=f"{name}: .* whose weights all stay on the device"):
        refuse_wishes(MemoryArgs(**options), "a model")
    refuse_wishes(MemoryArgs(performance_mode="speed", gpu_memory_limit=20.0), "a model")


class StandInRuntime:
    """What a GPU's runtime knows of pinned memory: no byte is registered twice, and none that is unmapped stays."""

    def __init__(self, most_bytes: int = 1 << 30) -> None:
        self.registered: dict[int, int] = {}
        self.most_bytes = most_bytes

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802 (the runtime's names)
        """0, or the error that says that some of it is registered."""
        if any(address < begin + size and begin < address + num_bytes for begin, size in self.registered.items()):
            return 712
        if num_bytes > self.most_bytes:
            return 2
        self.registered[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        """0."""
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> StandInRuntime:
    found = StandInRuntime()

    def check_error(code: int) -> None:
        if code:
            raise RuntimeError(f"error {code}")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(host_weights, "_forget_error", lambda: None)
    return found


def test_memory_that_was_pinned_is_released_before_others_get_its_address(runtime: StandInRuntime) -> None:
    layer = nn.Linear(64, 48)
    exact = layer.weight.detach().clone()
    for _ in range(5):
        with torch.inference_mode():
            weights = HostWeights([parameter.detach() for parameter in layer.parameters()], pin=True)
        assert len(runtime.registered) == 1
        view = weights.views(weights.spans[0].source)[0]
        assert torch.equal(view, exact)
        assert not view.is_inference()
        del weights
        assert len(runtime.registered) == 1, "a tensor still lies in it"
        del view
        assert not runtime.registered


def test_weights_before_a_merge_are_kept_also_where_memory_cannot_be_pinned(
    runtime: StandInRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The fast way, and the two in which the host has too little."""
    assert len(original_weights.memory_for(4096, pin=True)) == 4096
    assert not runtime.registered, "it has gone with its tensor"
    memory = original_weights.memory_for(4096, pin=True)
    assert len(runtime.registered) == 1
    runtime.most_bytes = 1024
    with caplog.at_level("WARNING"):
        assert len(original_weights.memory_for(4096, pin=True)) == 4096
    assert "not pinned: error 2" in caplog.text and len(runtime.registered) == 1
    runtime.most_bytes = 1 << 30
    monkeypatch.setattr(original_weights, "free_bytes", lambda device: 8000)
    assert len(original_weights.memory_for(4096, pin=True)) == 4096
    assert len(runtime.registered) == 1, "half of what is free is left to others"
    del memory
