"""Step caches: the rules against written-out ones and diffusers', each family alone and in company, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.sample.cache_params import with_environment
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.configs.teacache import TeaCacheFit
from sglang.multimodal_gen.errors import (
    IncompatibleParameters,
    InvalidType,
    InvalidValue,
    MissingParameter,
    UnknownParameter,
    UnsupportedParameter,
)
from sglang.multimodal_gen.runtime.cache.choice import fitted_models
from sglang.multimodal_gen.runtime.cache.step_cache import COLD_START, StepCache
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRun, BlockRunner
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.pipelines_core.denoiser import unpack
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import EMPTY
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.state_file import write_state
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs
from sglang.multimodal_gen.test.parallel_pool import FAMILIES, TEACACHE, Wish
from sglang.multimodal_gen.test.pipeline_parity import (
    LATENT_TOLERANCE,
    admitted,
    finished,
    load,
    present_phase,
    relative_error,
    run,
    run_together,
)
from sglang.multimodal_gen.test.tiny_checkpoints import TinyWan, save_tiny_wan

# Tiny transformers change more from step to step than real ones do.
SKIPPING: Wish = {
    "enable_cache_dit": True,
    "cache_dit_params": {
        "residual_diff_threshold": 1.2,
        "max_warmup_steps": 2,
        "max_continuous_cached_steps": 2,
    },
}
BASE: Wish = {
    "prompt": "a red circle",
    "negative_prompt": "green",
    "width": 48,
    "height": 80,
    "num_frames": 9,
    "num_inference_steps": 9,
    "guidance_scale": 4.0,
    "seed": 5,
    "output_type": "latent",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As the worker does."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("caches")
    return functools.cache(lambda name: FAMILIES[name].save(root / name))


@pytest.fixture(scope="module")
def pipeline_of(checkpoints: Callable[[str], Path]) -> Callable[[str], Any]:
    return functools.cache(lambda name: load(checkpoints(name)))


@pytest.fixture(scope="module")
def deep_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the family whose blocks leave the text alone, with five of them."""
    recipe = TinyWan(seed=2, transformer={"num_layers": 5, "ffn_dim": 24})
    return save_tiny_wan(tmp_path_factory.mktemp("deep") / "wan", recipe)


@pytest.fixture(scope="module")
def deep(deep_checkpoint: Path) -> Any:
    return load(deep_checkpoint)


def wishes_of(name: str) -> list[Wish]:
    """Of tests that share forwards, without the frames."""
    return [wish | {"output_type": "latent"} for wish in FAMILIES[name].wishes]


def cache_of(req: Req) -> StepCache:
    assert req.step_cache is not None
    return req.step_cache


def counts(req: Req) -> tuple[int, int, int]:
    cache = cache_of(req)
    return cache.computed_steps, cache.computed_rows, cache.num_rows


# --- off, and on without an effect ---


def test_a_cache_that_is_off_changes_no_bit_and_runs_nothing_of_its_own(deep: Any) -> None:
    plain, _ = run(deep, BASE)
    off, _ = run(deep, BASE | {"enable_cache_dit": False, "enable_teacache": False})
    assert plain.step_cache is None and off.step_cache is None
    assert torch.equal(_latents(plain), _latents(off))
    assert not deep.transformer.block_runner.is_caching
    assert "enable_teacache" not in off.params.recorded() and "enable_cache_dit" not in off.params.recorded()


@pytest.mark.parametrize(
    ("switch", "settings", "key"),
    [
        ("enable_cache_dit", "cache_dit_params", "residual_diff_threshold"),
        ("enable_teacache", "teacache_params", "teacache_thresh"),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_threshold_of_zero_computes_every_step(
    name: str, switch: str, settings: str, key: str, pipeline_of: Callable[[str], Any]
) -> None:
    """A polynomial below zero included."""
    wish, pipeline = wishes_of(name)[0], pipeline_of(name)
    knobs: Wish = {key: 0.0}
    if switch == "enable_teacache":
        knobs |= {"coefficients": [1.0, -5.0], "start_skipping": 0}
    plain, _ = run(pipeline, wish)
    cached, _ = run(pipeline, wish | {switch: True, settings: knobs})
    computed_steps, computed, rows = counts(cached)
    assert computed_steps == 3 and computed == rows > 0
    # Rows in company are computed as they are alone: the same bits.
    assert torch.equal(_latents(plain), _latents(cached))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_blocks_are_given_is_not_held_while_others_run(name: str, pipeline_of: Callable[[str], Any]) -> None:
    """Without a cache: a tensor as large as the tokens, for nothing."""
    transformer, alive = pipeline_of(name).transformer, []
    blocks = [block for each in _BLOCKS for block in getattr(transformer, each, ())]
    hooks = [
        blocks[0].register_forward_pre_hook(lambda _, given: alive.append(weakref.ref(given[0]))),
        blocks[-1].register_forward_pre_hook(lambda *_: alive.append(alive[-1]())),
    ]
    try:
        run(pipeline_of(name), wishes_of(name)[1])
    finally:
        for hook in hooks:
            hook.remove()
    assert len(alive) >= 2 and alive[1] is None


_BLOCKS = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers")


# --- against diffusers ---


def _latents(req: Req) -> Tensor:
    assert req.latents is not None
    return req.latents


def _of_diffusers(directory: Path, values: Mapping[str, Any], threshold: float) -> tuple[Tensor, int]:
    """Final latents as its pipeline gives them, and how often its second block was called."""
    index = diffusers.DiffusionPipeline.load_config(directory)
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(directory, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    blocks = [block for name in _BLOCKS for block in getattr(pipeline.transformer, name, ())]
    # A layer inside of what the cache skips.
    next(iter(blocks[1].children())).register_forward_hook(count)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    arguments = {key: value for key, value in values.items() if key not in ("seed", "output_type")}
    found: list[Tensor] = []

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found[:] = [tensors["latents"]]
        return tensors

    generator = torch.Generator().manual_seed(values["seed"])
    pipeline(**arguments, generator=generator, callback_on_step_end=keep, output_type="latent")
    return found[0][0], calls


# diffusers' LTX-Video decides once for both prompts, since it stacks them: so without guidance.
DIFFUSERS_CASES: dict[str, tuple[Wish, float]] = {
    "wan": (BASE | {"num_inference_steps": 8}, 0.4),
    "hunyuan_video": (wishes_of("hunyuan_video")[2] | {"num_inference_steps": 8}, 0.25),
    "flux": (wishes_of("flux")[2] | {"num_inference_steps": 6}, 0.5),
    "qwen": (wishes_of("qwen")[0] | {"num_inference_steps": 8}, 0.65),
    "ltx": (wishes_of("ltx")[2] | {"num_inference_steps": 4}, 0.3),
}


@pytest.mark.parametrize("name", DIFFUSERS_CASES)
def test_the_first_block_cache_is_diffusers(
    name: str, checkpoints: Callable[[str], Path], pipeline_of: Callable[[str], Any]
) -> None:
    """With its settings, which have no warm-up and no limit; guidance decides for each prompt by itself, as there."""
    (values, threshold), pipeline = DIFFUSERS_CASES[name], pipeline_of(name)
    knobs = {"max_warmup_steps": 0, "max_continuous_cached_steps": -1, "residual_diff_threshold": threshold}
    ours, _ = run(pipeline, values | {"enable_cache_dit": True, "cache_dit_params": knobs})
    theirs, calls = _of_diffusers(checkpoints(name), values, threshold)
    _, computed, rows = counts(ours)
    assert computed == calls and 0 < computed < rows, "some forwards are skipped, some are not"
    latents = _latents(ours)
    if theirs.ndim == 2:
        side = 1 if theirs.shape[1] == latents.shape[0] else 2
        grid = (latents.shape[1], latents.shape[2] // side, latents.shape[3] // side)
        theirs = unpack(theirs.unsqueeze(0), grid, side)[0]
    assert relative_error(latents, theirs) <= LATENT_TOLERANCE
    plain, _ = run(pipeline, values)
    assert relative_error(latents, _latents(plain)) > 10 * LATENT_TOLERANCE, "skipping changed nothing"


# --- against the rules, written out ---


class WrittenOut:
    """A runner of one row at a time, in turns of `num_branches`, that follows a rule of its own."""

    tokens = None

    def __init__(
        self, decide: Callable[[dict[str, Any], Tensor, Tensor, Callable[[str], Tensor]], Tensor], branches: int
    ):
        self.decide, self.memories, self.calls = decide, [{"step": -1} for _ in range(branches)], 0

    def using(self, caches: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def run(self, streams: Any, run: BlockRun, *, num_tokens: int, signal: Callable[[str, Tensor], Tensor]) -> Tensor:
        memory = self.memories[self.calls % len(self.memories)]
        self.calls += 1
        memory["step"] += 1

        def blocks(hidden: Tensor, first: int, last: int) -> Tensor:
            for layer, block in list(enumerate(run.blocks))[first:last]:
                (hidden,) = run.call(layer, block, (hidden,), *run.given)
            return hidden

        return self.decide(memory, streams[0], blocks, lambda name: signal(name, streams[0]))


def relative_change(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().mean() / before.abs().mean())


def written_out(pipeline: Any, values: Wish, decide: Any, branches: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """The final latents of an uncached request whose forwards follow the rule."""
    denoiser = next(stage.denoiser for stage in pipeline.stages if stage.name == "denoise")
    runner, plain = WrittenOut(decide, branches), pipeline.transformer.block_runner
    pipeline.transformer.block_runner = denoiser.block_runner = runner
    pipeline_stage = next(stage for stage in pipeline.stages if stage.name == "denoise")
    shrink, pipeline_stage._admit_cache = pipeline_stage._admit_cache, lambda req: None
    try:
        [req] = admitted(pipeline, [(values, EMPTY)])
        req.max_forward_rows = 1
        [(req, _)] = finished(pipeline, [req])
    finally:
        pipeline.transformer.block_runner = denoiser.block_runner = plain
        pipeline_stage._admit_cache = shrink
    return _latents(req), runner.memories


@pytest.mark.parametrize("modulation", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_teacache_is_as_written_out(deep: Any, modulation: bool, guidance_scale: float) -> None:
    coefficients, threshold, start, end = [0.05, 0.1, 0.01], 0.3, 2, 11

    def decide(memory: dict[str, Any], hidden: Tensor, blocks: Any, signal: Callable[[str], Tensor]) -> Tensor:
        now = signal("modulation" if modulation else "timestep")
        compute = not start <= memory["step"] < end
        if not compute:
            memory["sum"] += float(np.poly1d(coefficients)(relative_change(now, memory["signal"])))
            compute = memory["sum"] >= threshold
        memory["signal"] = now
        if compute:
            memory["sum"], memory["computed"] = 0.0, memory.get("computed", 0) + 1
            found = blocks(hidden, 0, None)
            memory["residual"] = found - hidden
            return found
        return hidden + memory["residual"]

    values = BASE | {"num_inference_steps": 12, "guidance_scale": guidance_scale}
    knobs = {"coefficients": coefficients, "teacache_thresh": threshold, "start_skipping": start, "end_skipping": -1}
    ours, _ = run(deep, values | {"enable_teacache": True, "teacache_params": knobs | {"use_ret_steps": modulation}})
    branches = 2 if guidance_scale > 1 else 1
    theirs, memories = written_out(deep, values, decide, branches)
    steps, computed, rows = counts(ours)
    assert computed == sum(memory["computed"] for memory in memories)
    assert (steps, rows) == (memories[0]["computed"], 12 * branches) and 3 < steps < 12
    assert relative_error(_latents(ours), theirs) <= LATENT_TOLERANCE


@pytest.mark.parametrize(("first", "last"), [(1, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_first_block_cache_with_all_its_settings_is_as_written_out(
    deep: Any, first: int, last: int, order: int
) -> None:
    threshold, warm_up, most = 0.7, 3, 2

    def decide(memory: dict[str, Any], hidden: Tensor, blocks: Any, _: Any) -> Tensor:
        opened = blocks(hidden, 0, first)
        now, step = opened - hidden, memory["step"]
        skips = step >= warm_up and memory["skipped"] < most and relative_change(now, memory["opened"]) < threshold
        if not skips:
            found = blocks(opened, first, 5 - last)
            history = memory.setdefault("history", [])
            history.append((step, found - opened))
            memory |= {"opened": now, "skipped": 0, "computed": memory.get("computed", 0) + 1}
            return blocks(found, 5 - last, None)
        memory["skipped"] += 1
        return blocks(opened + _extrapolated(memory["history"], step, order), 5 - last, None)

    values = BASE | {"num_inference_steps": 14}
    knobs = {
        "Fn_compute_blocks": first,
        "Bn_compute_blocks": last,
        "residual_diff_threshold": threshold,
        "max_warmup_steps": warm_up,
        "max_continuous_cached_steps": most,
        "enable_taylorseer": order > 0,
        "taylorseer_order": max(1, order),
    }
    ours, _ = run(deep, values | {"enable_cache_dit": True, "cache_dit_params": knobs})
    theirs, memories = written_out(deep, values, decide, 2)
    assert counts(ours)[1:] == (sum(memory["computed"] for memory in memories), 28)
    assert 6 < counts(ours)[1] < 28
    assert relative_error(_latents(ours), theirs) <= LATENT_TOLERANCE


def _extrapolated(history: list[tuple[int, Tensor]], step: int, order: int) -> Tensor:
    """Taylor's series over backward differences, each divided by the steps that lie between its two values."""
    table = [[value] for _, value in history]
    for index in range(1, len(history)):
        passed = history[index][0] - history[index - 1][0]
        for degree in range(min(order, len(table[index - 1]))):
            table[index].append((table[index][degree] - table[index - 1][degree]) / passed)
    ahead = step - history[-1][0]
    factorials = [1, 1, 2, 6]
    return sum(
        (value * ahead**degree / factorials[degree] for degree, value in enumerate(table[-1][: order + 1])),
        torch.zeros(()),
    )


# --- in company ---


def _mixed(name: str) -> list[Wish]:
    """Requests that share forwards: both caches, other settings of them, and none."""
    first, second, third = wishes_of(name)
    # The shift of the tiny checkpoint leaves no room for more.
    most = 4 if name == "ltx" else 7
    return [
        first | {"num_inference_steps": most} | SKIPPING,
        second | {"num_inference_steps": most - 1} | TEACACHE,
        third | {"num_inference_steps": 3},
        third | {"num_inference_steps": most, "seed": 9} | SKIPPING,
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_requests_with_different_caches_share_forwards_and_stay_as_they_are(
    name: str, pipeline_of: Callable[[str], Any]
) -> None:
    """Decisions are each row's own, so that nobody's result depends on who else is there."""
    pipeline = pipeline_of(name)
    wishes = _mixed(name)
    alone = [run(pipeline, wish)[0] for wish in wishes]
    together = [req for req, _ in run_together(pipeline, [(wish, EMPTY) for wish in wishes])]
    assert len({req.phases[1].batch_key for req in together}) == 1
    for one, other in zip(alone, together, strict=True):
        assert relative_error(other.latents, _latents(one)) <= LATENT_TOLERANCE
        if one.step_cache is not None:
            assert counts(one) == counts(other)
            _, computed, rows = counts(one)
            assert computed < rows, "nothing was skipped"


def test_rows_that_skip_are_not_computed(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block sees only the rows that need it."""
    sizes: list[int] = []
    hook = deep.transformer.blocks[-1].register_forward_hook(lambda _, given, __: sizes.append(given[0].shape[0]))
    wishes = [BASE | SKIPPING, BASE | {"seed": 6}]
    try:
        requests = [req for req, _ in run_together(deep, [(wish, EMPTY) for wish in wishes])]
    finally:
        hook.remove()
    assert sum(sizes) == 2 * 9 + counts(requests[0])[1]
    assert {2, 4} <= set(sizes), "in some forwards one request skips, in some none does"


def test_guidance_that_leaves_layers_out_has_a_cache_of_its_own(pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of("sd3")
    skips = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}
    wish = wishes_of("sd3")[0] | {"num_inference_steps": 9, "guidance_scale": 4.0} | skips
    alone, _ = run(pipeline, wish | SKIPPING)
    [(together, _), _] = run_together(pipeline, [(wish | SKIPPING, EMPTY), (wish | {"seed": 8}, EMPTY)])
    assert counts(alone) == counts(together) and counts(alone)[2] == 9 * 2 + 8
    assert counts(alone)[1] < counts(alone)[2]
    assert relative_error(together.latents, _latents(alone)) <= LATENT_TOLERANCE


def test_one_row_at_a_time_decides_as_all_at_once(deep: Any) -> None:
    together, _ = run(deep, BASE | SKIPPING)
    [req] = admitted(deep, [(BASE | SKIPPING, EMPTY)])
    req.max_forward_rows = 1
    [(apart, _)] = finished(deep, [req])
    assert counts(apart) == counts(together) and counts(apart)[1] < 18
    assert relative_error(apart.latents, _latents(together)) <= LATENT_TOLERANCE


def test_a_step_that_fails_leaves_what_is_remembered_as_it_was(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = run(deep, BASE | SKIPPING)
    [req] = admitted(deep, [(BASE | SKIPPING, EMPTY)])
    stage = next(stage for stage in deep.stages if stage.name == "denoise")
    for number in range(20):
        phase = present_phase(req)
        if phase is None or phase.name != "denoise":
            if number:
                break
            assert phase is not None
        elif number % 2:
            before = dict(cache_of(req).rows)
            with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no more"):
                patch.setattr(stage.guidance, "combine", _fail)
                deep.run_unit(phase.name, [req])
            assert cache_of(req).rows == before
        deep.run_unit(phase.name, [req])
    [(req, _)] = finished(deep, [req])
    assert counts(req) == counts(expected)
    assert torch.equal(_latents(req), _latents(expected))


def _fail(*_: Any) -> None:
    raise RuntimeError("no more")


# --- memory, cancel, restart ---


@pytest.mark.parametrize("taylor", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_cache_holds_is_planned_and_freed(name: str, taylor: bool, pipeline_of: Callable[[str], Any]) -> None:
    pipeline = pipeline_of(name)
    knobs = {**SKIPPING["cache_dit_params"], "enable_taylorseer": taylor, "taylorseer_order": 2}
    wish = wishes_of(name)[0] | {"num_inference_steps": 4}
    cached = {"enable_cache_dit": True, "cache_dit_params": knobs}
    [plain] = admitted(pipeline, [(wish, EMPTY)])
    [req] = admitted(pipeline, [(wish | cached, EMPTY)])
    while present_phase(req).name != "denoise" or req.done("denoise") < 3:  # type: ignore[union-attr]
        pipeline.run_unit(present_phase(req).name, [req])  # type: ignore[union-attr]
    planned = [next(phase for phase in each.phases if phase.lane == "denoise") for each in (plain, req)]
    cache = cache_of(req)
    assert 0 < cache.held_bytes <= planned[1].held_bytes - planned[0].held_bytes
    assert planned[1].peak_bytes > planned[0].peak_bytes
    tensors = [weakref.ref(factor) for state in cache.rows.values() for factor in state.factors]
    assert tensors
    pipeline.release(req)  # as a cancel does in the middle of it
    assert req.step_cache is None
    del cache
    gc.collect()
    assert not [tensor for tensor in tensors if tensor() is not None]


def test_nothing_is_held_once_the_steps_are_done(deep: Any) -> None:
    req, _ = run(deep, BASE | SKIPPING)
    assert cache_of(req).held_bytes == 0 and counts(req)[2] == 18


@pytest.mark.parametrize("cache", [SKIPPING, TEACACHE], ids=["first block", "teacache"])
@pytest.mark.parametrize("steps", [1, 3, 4, 6, 9])
def test_a_request_goes_on_to_the_bit_from_its_file(deep: Any, tmp_path: Path, cache: Wish, steps: int) -> None:
    taylor = {"enable_taylorseer": True} if "cache_dit_params" in cache else {}
    wish = BASE | cache
    if taylor:
        wish = wish | {"cache_dit_params": cache["cache_dit_params"] | taylor}
    whole, _ = run(deep, wish)
    [first] = admitted(deep, [(wish, EMPTY)])
    while first.done("denoise") < steps:
        deep.run_unit(present_phase(first).name, [first])  # type: ignore[union-attr]
    write_state(tmp_path / "s", deep.saved_state(first), identity=deep.state_identity(first))
    deep.release(first)
    [second] = admitted(deep, [(wish, EMPTY)])
    deep.restore(second, tmp_path / "s")
    [(second, _)] = finished(deep, [second])
    assert counts(second) == counts(whole) and counts(whole)[1] < 18
    assert torch.equal(_latents(second), _latents(whole))
    assert COLD_START not in second.notes


def test_a_state_of_several_ranks_comes_back_without_the_cache_and_says_so(deep: Any, tmp_path: Path) -> None:
    """Each rank has its share of the tokens or its rows, and only one of them saves."""
    [first] = admitted(deep, [(BASE | SKIPPING, EMPTY)])
    cache_of(first).whole = False
    while first.done("denoise") < 4:
        deep.run_unit(present_phase(first).name, [first])  # type: ignore[union-attr]
    write_state(tmp_path / "s", deep.saved_state(first), identity=deep.state_identity(first))
    before = counts(first)
    [second] = admitted(deep, [(BASE | SKIPPING, EMPTY)])
    cache_of(second).whole = False
    deep.restore(second, tmp_path / "s")
    assert second.notes == [COLD_START] and counts(second) == before and not cache_of(second).rows
    deep.run_unit("denoise", [second])
    assert counts(second)[1] == before[1] + 2, "it warms up anew"


# --- parameters ---


@pytest.mark.parametrize(
    ("wish", "error", "sentence"),
    [
        (
            {"enable_cache_dit": True, "cache_dit_params": {"scm_preset": "fast"}},
            UnknownParameter,
            r"unknown key cache_dit_params.scm_preset; accepted are Fn_compute_blocks, .*taylorseer_order",
        ),
        (
            {"enable_cache_dit": True, "cache_dit_params": {"Fn_compute_blocks": 0}},
            InvalidValue,
            "cache_dit_params.Fn_compute_blocks: got 0, accepted is an integer of at least 1",
        ),
        (
            {"enable_cache_dit": True, "cache_dit_params": {"enable_taylorseer": 1}},
            InvalidType,
            "cache_dit_params.enable_taylorseer: got 1, accepted is true or false",
        ),
        (
            {"enable_cache_dit": True, "cache_dit_params": {"Fn_compute_blocks": 5}},
            InvalidValue,
            "cache_dit_params.Fn_compute_blocks: got 5, accepted is an integer from 1 to 4: this model has 5 blocks",
        ),
        (
            {"enable_cache_dit": True, "cache_dit_params": {"Fn_compute_blocks": 3, "Bn_compute_blocks": 2}},
            InvalidValue,
            "cache_dit_params.Bn_compute_blocks: got 2, accepted is an integer from 0 to 1: of the model's 5 blocks 3",
        ),
        ({"cache_dit_params": {}}, IncompatibleParameters, "cache_dit_params: .* with enable_cache_dit"),
        (
            {"enable_cache_dit": False, "cache_dit_params": {"max_warmup_steps": 1}},
            IncompatibleParameters,
            "cache_dit_params: .* with enable_cache_dit",
        ),
        ({"teacache_params": {}}, IncompatibleParameters, "teacache_params: .* with enable_teacache"),
        (
            {"enable_cache_dit": True, "enable_teacache": True},
            IncompatibleParameters,
            "enable_teacache: the request has enable_cache_dit too, accepted is one of them",
        ),
        (
            {"enable_teacache": True},
            MissingParameter,
            "teacache_params.coefficients: not given, .* a model that has them: Wan-AI/Wan2.1-T2V-1.3B-Diffusers, ",
        ),
        (
            {"enable_teacache": True, "teacache_params": {"coefficients": [1, 0]}},
            MissingParameter,
            "teacache_params.teacache_thresh: not given",
        ),
        (
            {"enable_teacache": True, "teacache_params": {"coefficients": "1"}},
            InvalidType,
            "teacache_params.coefficients: got 1, accepted is a list of numbers",
        ),
        (
            {"enable_teacache": True, "teacache_params": {"start_skipping": 1.5}},
            InvalidValue,
            "teacache_params.start_skipping: got 1.5, accepted is an integer, or a share of the steps from 0.0 to 1.0",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(deep: Any, wish: Wish, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        admitted(deep, [(BASE | wish, EMPTY)])


def test_what_only_other_transformers_have_is_refused(pipeline_of: Callable[[str], Any]) -> None:
    wish = wishes_of("flux")[0]
    with pytest.raises(InvalidValue, match="Bn_compute_blocks: got 1, accepted is 0: this model's blocks change the"):
        admitted(
            pipeline_of("flux"),
            [(wish | {"enable_cache_dit": True, "cache_dit_params": {"Bn_compute_blocks": 1}}, EMPTY)],
        )
    knobs = {"coefficients": [1.0, 0.0], "teacache_thresh": 0.1, "use_ret_steps": True}
    with pytest.raises(InvalidValue, match="use_ret_steps: got True, accepted is false: this model watches the first"):
        admitted(pipeline_of("flux"), [(wish | {"enable_teacache": True, "teacache_params": knobs}, EMPTY)])


@pytest.mark.parametrize("switch", ["enable_cache_dit", "enable_teacache"])
def test_a_pipeline_without_a_transformer_of_ours_refuses_both(switch: str) -> None:
    pipeline = build_pipeline("null-model", ExecutionArgs(device="cpu"))
    with pytest.raises(UnsupportedParameter, match=f"{switch}: .*has no transformer whose blocks could be skipped"):
        pipeline.admit("a", SamplingParams.from_values({"prompt": "a", switch: True}))


def test_settings_that_leave_no_step_to_skip_are_noted(deep: Any) -> None:
    [few] = admitted(deep, [(BASE | {"num_inference_steps": 4, "enable_cache_dit": True}, EMPTY)])
    assert few.notes == ["the step cache skips nothing: its settings leave no step that it could skip"]
    [more] = admitted(deep, [(BASE | {"num_inference_steps": 5, "enable_cache_dit": True}, EMPTY)])
    assert more.notes == []


def test_steps_may_be_given_as_shares_and_from_the_end(deep: Any) -> None:
    def window(**knobs: Any) -> tuple[int, int]:
        params = TEACACHE["teacache_params"] | knobs
        [req] = admitted(deep, [(BASE | {"num_inference_steps": 20} | TEACACHE | {"teacache_params": params}, EMPTY)])
        rule: Any = cache_of(req).rule
        return rule.start, rule.end

    assert window(start_skipping=5, end_skipping=-1) == (5, 19)
    assert window(start_skipping=0.25, end_skipping=0.9) == (5, 18)
    assert window(start_skipping=0, end_skipping=1.0) == (0, 20)
    assert window(start_skipping=3, end_skipping=12) == (3, 12)


def test_models_bring_what_is_published_for_them(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = TeaCacheFit(coefficients=(1.0, 2.0), modulation_coefficients=(3.0, 4.0), threshold=0.07)
    stage = next(stage for stage in deep.stages if stage.name == "denoise")
    monkeypatch.setattr(stage, "teacache", fit)

    def rule(knobs: Wish) -> Any:
        return cache_of(admitted(deep, [(BASE | {"enable_teacache": True, "teacache_params": knobs}, EMPTY)])[0]).rule

    assert (rule({}).coefficients, rule({}).threshold, rule({}).signal) == ((1.0, 2.0), 0.07, "timestep")
    late = rule({"use_ret_steps": True, "teacache_thresh": 0.2})
    assert (late.coefficients, late.threshold, late.signal) == ((3.0, 4.0), 0.2, "modulation")
    assert "hunyuanvideo-community/HunyuanVideo" in fitted_models() and len(fitted_models()) > 6


def test_every_variable_sets_its_key_and_requests_win(deep: Any) -> None:
    environ = {
        "SGLANG_CACHE_DIT_ENABLED": "true",
        "SGLANG_CACHE_DIT_FN": "2",
        "SGLANG_CACHE_DIT_BN": "1",
        "SGLANG_CACHE_DIT_WARMUP": "3",
        "SGLANG_CACHE_DIT_RDT": "0.1",
        "SGLANG_CACHE_DIT_MC": "-1",
        "SGLANG_CACHE_DIT_TAYLORSEER": "1",
        "SGLANG_CACHE_DIT_TS_ORDER": "2",
        "SGLANG_DIFFUSION_SEED": "",
    }
    defaults = with_environment(SamplingParams(), environ)
    assert defaults.enable_cache_dit is True
    assert defaults.cache_dit_params == {
        "Fn_compute_blocks": 2,
        "Bn_compute_blocks": 1,
        "max_warmup_steps": 3,
        "residual_diff_threshold": 0.1,
        "max_continuous_cached_steps": -1,
        "enable_taylorseer": True,
        "taylorseer_order": 2,
    }
    silent = SamplingParams(prompt="a").filled_from(defaults)
    assert silent.enable_cache_dit and silent.cache_dit_params == defaults.cache_dit_params
    assert silent.filled_from(defaults) == silent
    own = SamplingParams(prompt="a", cache_dit_params={"max_warmup_steps": 7}).filled_from(defaults)
    assert own.cache_dit_params == {**silent.cache_dit_params, "max_warmup_steps": 7}
    off = SamplingParams(prompt="a", enable_cache_dit=False).filled_from(defaults)
    assert off.enable_cache_dit is False and off.cache_dit_params is None
    other = SamplingParams(prompt="a", enable_teacache=True).filled_from(defaults)
    assert other.enable_cache_dit is None and other.cache_dit_params is None
    only_settings = with_environment(SamplingParams(), environ | {"SGLANG_CACHE_DIT_ENABLED": ""})
    assert SamplingParams(prompt="a").filled_from(only_settings).cache_dit_params is None
    asked = SamplingParams(prompt="a", enable_cache_dit=True).filled_from(only_settings)
    assert asked.cache_dit_params == defaults.cache_dit_params


@pytest.mark.parametrize(
    ("variable", "text", "sentence"),
    [
        ("SGLANG_CACHE_DIT_ENABLED", "maybe", "got maybe, accepted is true or false"),
        ("SGLANG_CACHE_DIT_RDT", "-1", "got -1.0, accepted is a number of at least 0"),
        ("SGLANG_CACHE_DIT_FN", "first", "got first, accepted is an integer of at least 1"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(
    variable: str, text: str, sentence: str, deep_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises((InvalidType, InvalidValue), match=f"{variable}: {sentence}"):
        load(deep_checkpoint)


def test_the_environment_is_what_silent_requests_get(deep_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CACHE_DIT_ENABLED", "true")
    monkeypatch.setenv("SGLANG_CACHE_DIT_FN", "2")
    pipeline = load(deep_checkpoint)
    [req] = admitted(pipeline, [(BASE, EMPTY)])
    assert cache_of(req).rule.row(None, 0).first_blocks == 2
    assert pipeline.model_info().defaults.enable_cache_dit is True
    assert envs.unknown_variables({"SGLANG_CACHE_DIT_SCM_PRESET": "fast", "SGLANG_CACHE_DIT_FN": "2"}, []) == (
        "the environment variable SGLANG_CACHE_DIT_SCM_PRESET is not known and has no effect",
    )


def test_parameters_of_a_cache_are_recorded_with_the_result() -> None:
    params = SamplingParams(prompt="a", enable_teacache=True, teacache_params={"teacache_thresh": 0.1})
    assert dataclasses.replace(params).recorded()["teacache_params"] == {"teacache_thresh": 0.1}
    assert params.recorded()["enable_teacache"] is True


def test_a_runner_wants_a_row_for_each_cache(deep: Any) -> None:
    runner: BlockRunner = deep.transformer.block_runner
    with runner.using([None, None]):
        assert not runner.is_caching
    [req] = admitted(deep, [(BASE | SKIPPING, EMPTY)])
    with runner.using([cache_of(req).row("denoise", 0, 0)]):
        assert runner.is_caching
    assert not runner.is_caching
