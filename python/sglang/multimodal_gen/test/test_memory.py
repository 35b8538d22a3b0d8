"""Memory: what is learned of it, who gets it, what happens when it runs out."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang.multimodal_gen.configs.request_plan import Phase
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import ModelTooLarge
from sglang.multimodal_gen.runtime.managers.memory import Budget, LearnedMemory
from sglang.multimodal_gen.runtime.models.vaes.tiling import Tiling
from sglang.multimodal_gen.runtime.models.vaes.wan_vae import DecoderState
from sglang.multimodal_gen.runtime.pipelines.wan import WanPipeline
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.memory import free_bytes, limit_memory, longest_chunk
from sglang.multimodal_gen.runtime.pipelines_core.memory_meter import ProcessMeter
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

MIB = 2**20
REQUEST = {
    "prompt": "a red circle",
    "negative_prompt": "green square",
    "width": 48,
    "height": 80,
    "num_frames": 13,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "seed": 5,
}


# --- learned ---


def test_estimates_hold_until_a_kind_of_unit_was_measured() -> None:
    learned = LearnedMemory()
    assert learned.needed_bytes("a", 100) == 100
    learned.record("a", estimated_bytes=200, measured_bytes=100)
    assert (learned.needed_bytes("a", 100), learned.needed_bytes("b", 100)) == (50, 100)
    learned.record("a", estimated_bytes=100, measured_bytes=300)
    assert learned.needed_bytes("a", 100) == 300


def test_an_early_outlier_is_forgotten() -> None:
    learned = LearnedMemory()
    learned.record("a", estimated_bytes=1, measured_bytes=1000)
    for _ in range(8):
        learned.record("a", estimated_bytes=1, measured_bytes=2)
    assert learned.needed_bytes("a", 10) == 20


def test_after_running_out_half_as_many_requests_share_a_forward() -> None:
    learned = LearnedMemory()
    learned.ran_out("a", 8)
    assert (learned.largest_batch("a", 8), learned.largest_batch("b", 8)) == (4, 8)
    learned.ran_out("a", 1)
    assert learned.largest_batch("a", 8) == 1


# --- reserved ---


@dataclass(frozen=True)
class Wish:
    phases: tuple[Phase, ...]


def wish(held: int, peak: int) -> Wish:
    return Wish(
        (
            Phase(name="e", lane="encode", units=1, batch_key="e", cost=1.0, peak_bytes=1),
            Phase(name="d", lane="denoise", units=4, batch_key="d", cost=1.0, peak_bytes=peak, held_bytes=held),
        )
    )


def test_what_is_held_adds_up_and_only_the_largest_unit_counts() -> None:
    budget = Budget(1000, LearnedMemory())
    assert budget.reserved_bytes([wish(100, 300), wish(50, 200)]) == 100 + 50 + 300
    assert budget.has_room(wish(100, 300), [wish(300, 500)])
    assert not budget.has_room(wish(100, 300), [wish(500, 500)])
    assert budget.has_room(wish(5000, 5000), []), "alone it always may try"


def test_a_measured_unit_makes_room_for_more_requests() -> None:
    learned = LearnedMemory()
    budget = Budget(1000, learned)
    assert not budget.has_room(wish(100, 900), [wish(100, 900)])
    learned.record("d", estimated_bytes=900, measured_bytes=450)
    assert budget.has_room(wish(100, 900), [wish(100, 900)])


# --- measured ---


def test_the_process_meter_sees_what_work_took_at_its_height_and_not_what_was_there_before() -> None:
    meter = ProcessMeter()
    before = torch.ones(64 * MIB // 4)
    meter.begin("work")
    del_me = torch.ones(200 * MIB // 4)
    del del_me
    peak = meter.peak_bytes()
    assert peak is not None
    assert 190 * MIB < peak < 260 * MIB
    assert meter.total_peak_bytes() > 264 * MIB
    assert before.numel()


def test_each_kind_of_work_is_measured_only_the_first_times() -> None:
    meter = ProcessMeter()
    seen = []
    for _ in range(4):
        meter.begin("work")
        seen.append(meter.peak_bytes() is not None)
    assert seen == [True, True, False, False]
    meter.begin("other work")
    assert meter.peak_bytes() is not None


# --- the Wan pipeline ---


@pytest.fixture(scope="module")
def pipeline(wan_checkpoint: Callable[[str], Path]) -> WanPipeline:
    built = build_pipeline(str(wan_checkpoint("plain")), ExecutionArgs(device="cpu"))
    assert isinstance(built, WanPipeline)
    return built


def test_weights_that_do_not_fit_beside_others_say_so(
    wan_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setitem(WanPipeline.components, "transformer", full)
    with pytest.raises(ModelTooLarge, match=r"memory ran out on cpu when .* other processes hold"):
        build_pipeline(str(wan_checkpoint("plain")), ExecutionArgs(device="cpu"))


def test_what_others_hold_of_a_device_is_what_is_neither_free_nor_ours() -> None:
    gib = 2**30
    error = ModelTooLarge("cuda:1", total_bytes=80 * gib, free_bytes=gib // 2, own_bytes=int(15.25 * gib))
    assert error.message == (
        "the model does not fit: memory ran out on cuda:1 when 15.2 GiB were loaded; of its 80.0 GiB other processes "
        "hold 64.2, so end them or take another GPU with --gpu-ids, or spread the weights with --tp-size"
    )


def finish(pipeline: WanPipeline, req: Req) -> np.ndarray:
    """Run what is left; the frames that come out."""
    frames = []
    with torch.inference_mode():
        for name in [phase.name for phase in req.phases]:
            while req.done(name) < next(phase.units for phase in req.phases if phase.name == name):
                frames += [output.frames for output in pipeline.run_unit(name, [req])]
    return torch.cat(frames).numpy().astype(int)


def tensor_bytes() -> int:
    """What all live tensors of this process take together."""
    storages = {
        (storage := value.untyped_storage()).data_ptr(): storage.nbytes()
        for value in gc.get_objects()
        if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta
    }
    return sum(storages.values())


def test_a_released_request_leaves_nothing_allocated(pipeline: WanPipeline) -> None:
    finish(pipeline, pipeline.admit("first", SamplingParams.from_values(REQUEST)))
    gc.collect()
    base = tensor_bytes()
    req = pipeline.admit("r", SamplingParams.from_values(REQUEST))
    finish(pipeline, req)
    assert tensor_bytes() > base
    pipeline.release(req)
    gc.collect()
    # What is left of the request object itself: its schedule, which is a few numbers.
    del req
    gc.collect()
    assert tensor_bytes() == base


def test_every_stage_can_be_planned_with_less_memory_and_gives_the_same_result(pipeline: WanPipeline) -> None:
    whole = finish(pipeline, pipeline.admit("a", SamplingParams.from_values(REQUEST)))
    req = pipeline.admit("b", SamplingParams.from_values(REQUEST))
    plans = [req.phases]
    for name in ("text_encode", "denoise", "decode", "decode"):
        assert pipeline.shrink(name, req)
        plans.append(req.phases)
    peaks = [[phase.peak_bytes for phase in plan] for plan in plans]
    assert peaks[1][0] < peaks[0][0] and peaks[2][1] < peaks[1][1] and peaks[4][2] < peaks[3][2] < peaks[2][2]
    assert [phase.units for phase in req.phases] == [1, 2, 4]
    assert not pipeline.shrink("decode", req), "48x80 is less than a tile"
    assert not pipeline.shrink("denoise", req) and not pipeline.shrink("text_encode", req)
    assert np.abs(finish(pipeline, req) - whole).max() <= 1


def test_a_clip_can_be_cut_anew_in_the_middle_of_its_decoding(pipeline: WanPipeline) -> None:
    params = SamplingParams.from_values(REQUEST | {"num_frames": 29})
    whole = finish(pipeline, pipeline.admit("a", params))
    req = pipeline.admit("b", params)
    req.decode_plan = req.decode_plan.recut(0, 3, None)
    req.phases = pipeline._phases(req)
    with torch.inference_mode():
        for name in ("text_encode", "denoise", "denoise"):
            pipeline.run_unit(name, [req])
        [first] = pipeline.run_unit("decode", [req])
    req.decoder_state = None  # as after a unit that failed half-way
    assert pipeline.shrink("decode", req)
    assert req.decode_plan.bounds == (0, 3, 4, 5, 6, 7, 8)
    rest = finish(pipeline, req)
    assert np.abs(np.concatenate([first.frames.numpy().astype(int), rest]) - whole).max() <= 1


def test_smaller_tiles_come_after_single_frames(pipeline: WanPipeline) -> None:
    req = pipeline.admit("r", SamplingParams.from_values(REQUEST | {"width": 400, "height": 320, "num_frames": 1}))
    tilings = []
    while pipeline.shrink("decode", req):
        tilings.append(req.decode_plan.tiling)
    half = Tiling(tile_height=128, tile_width=128, stride_height=96, stride_width=96)
    assert tilings == [Tiling(), half]
    assert req.notes.count("decoded in tiles to save memory; seams may show") == 1


def test_chunks_are_as_long_as_fits_and_pays() -> None:
    gib = 2**30
    assert longest_chunk(range(1, 22), lambda length: length * gib, free_bytes=6 * gib) == 3, "half of the memory"
    assert longest_chunk(range(1, 22), lambda length: length * gib, free_bytes=80 * gib) == 5, "more are no faster"
    assert longest_chunk(range(1, 4), lambda length: length * gib // 8, free_bytes=80 * gib) == 3, "the whole clip"
    assert longest_chunk(range(1, 22), lambda length: length * 12 * gib, free_bytes=80 * gib) == 1
    assert longest_chunk((21,), lambda length: length * gib, free_bytes=80 * gib) == 21, "one that is taken whole"
    assert longest_chunk(range(1, 22), lambda length: length * gib, free_bytes=gib) is None


def test_the_estimate_of_what_decoding_remembers_is_of_the_right_size(pipeline: WanPipeline) -> None:
    memory = WanPipeline.decoder_memory_of({"vae": pipeline.vae.config}, element_size=4)
    state = DecoderState(carry=True)
    with torch.inference_mode():
        pipeline.vae.decode_next(torch.randn(1, pipeline.vae.config.z_dim, 2, 10, 6), state)
    assert 0.5 < state.num_bytes() / memory.carried_bytes(80, 48) < 2.0


OUT_OF_MEMORY = """
import resource, sys, torch
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.memory import is_out_of_memory
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs

# Of the estimate, 0.7 would do for the whole clip and 0.2 not for its smallest piece.
pipeline = build_pipeline(sys.argv[1], ExecutionArgs(device="cpu"))
params = SamplingParams.from_values({"prompt": "x", "width": 256, "height": 256, "num_frames": 33,
                                     "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 1})
with torch.inference_mode():
    req = pipeline.admit("r", params)
    for name in ("text_encode", "denoise"):
        pipeline.run_unit(name, [req])
    assert req.phases[-1].units == 1, req.phases
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = used + int(0.4 * req.phases[-1].peak_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    num_failures, frames = 0, 0
    while req.done("decode") < req.phases[-1].units:
        try:
            for output in pipeline.run_unit("decode", [req]):
                frames += len(output.frames)
        except (MemoryError, RuntimeError) as error:
            assert is_out_of_memory(error), error
            num_failures += 1
            failed = True
        else:
            failed = False
        if failed:
            assert pipeline.shrink("decode", req), "nothing smaller is left"
print(num_failures, req.phases[-1].units, frames)
"""


def test_decoding_that_runs_out_of_real_memory_goes_on_in_smaller_pieces(
    wan_checkpoint: Callable[[str], Path],
) -> None:
    """The address space ends in the middle of the decoder; what the operating system refuses, torch raises."""
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(wan_checkpoint("plain"))],
        capture_output=True,
        text=True,
        timeout=110,
        # Address space, which is what is limited, also holds what the C library keeps: arenas, one for each thread, and
        # in them whatever was freed.
        env=os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_failures, units, frames = map(int, done.stdout.split())
    assert num_failures >= 1
    assert units > 1
    assert frames == 33


def test_a_limit_of_a_gpu_bounds_what_is_free_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GiB of which others hold 30; this process has reserved 6, of which 2 are not in use."""
    device, fractions = torch.device("cuda", 0), {"set": 1.0}
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (44 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4 * gib)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * gib))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fractions["set"])
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, _: fractions.update(set=fraction)
    )
    assert free_bytes(device) == 46 * gib
    limit_memory(device, None)
    assert free_bytes(device) == 46 * gib
    limit_memory(device, 16.0)
    assert free_bytes(device) == pytest.approx((16 - 6 + 2 - 0.75) * gib, abs=80)
    limit_memory(device, 1000.0)
    assert free_bytes(device) == 46 * gib
