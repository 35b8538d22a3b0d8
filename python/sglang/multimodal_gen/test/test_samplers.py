"""Samplers against diffusers' schedulers, and what the engine asks of their state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.models.schedulers import (
    CLASSES,
    NAMES,
    Sampler,
    SamplerState,
    build_sampler,
    sampler_with_name,
)

# diffusers converts a tensor with np.array() in DPMSolverMultistepScheduler.set_timesteps.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

EULER, UNIPC, DPMPP = CLASSES
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
WAN = {"_class_name": UNIPC, **FLOW, "flow_shift": 3.0}
SHAPE = (4, 3, 6, 5)  # C, T, H, W

# fp32 throughout: diffusers rounds its scalars to fp32 where ours are float64, and sums in another order. Measured
# worst case over all trajectories below: 4e-7.
TOLERANCE = 1e-5


def velocity(latents: Tensor, timestep: float) -> Tensor:
    """A stand-in for the network: nonlinear in the sample, different at each step."""
    return torch.tanh(1.3 * latents + 0.002 * timestep) - 0.4 * latents.roll(1, dims=-1)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def run(sampler: Sampler, latents: Tensor, state: SamplerState, *, until: int | None = None) -> Tensor:
    while not state.finished and state.step_index != until:
        latents = sampler.step(velocity(latents, state.timestep), latents, state)
    return latents


def reference(config: dict[str, Any]) -> Any:
    return getattr(diffusers, config["_class_name"])(**{k: v for k, v in config.items() if not k.startswith("_")})


def run_reference(scheduler: Any, latents: Tensor) -> Tensor:
    scheduler.set_begin_index(0)
    latents = latents[None]
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity(latents, timestep.item()), timestep, latents, return_dict=False)[0]
    return latents[0]


def assert_same_trajectory(config: dict[str, Any], steps: int, *, begin: Callable[[Any], None], **wishes: Any) -> None:
    scheduler, sampler = reference(config), build_sampler(config)
    begin(scheduler)
    schedule = sampler.schedule(steps, **wishes)
    assert schedule.timesteps.dtype == schedule.sigmas.dtype == torch.float32
    assert torch.equal(schedule.timesteps, scheduler.timesteps.float())
    assert torch.equal(schedule.sigmas, scheduler.sigmas)
    expected = run_reference(scheduler, noise())
    got = run(sampler, noise(), sampler.begin(schedule))
    error = (got - expected).norm() / expected.norm()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


STEPS = pytest.mark.parametrize("steps", [1, 2, 3, 5, 14, 20])
SHIFT = pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])


@STEPS
@SHIFT
def test_euler_equals_diffusers(steps: int, shift: float) -> None:
    config = {"_class_name": EULER, "shift": shift}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps))


def test_euler_equals_diffusers_to_the_bit() -> None:
    config = {"_class_name": EULER, "shift": 3.0}
    scheduler, sampler = reference(config), build_sampler(config)
    scheduler.set_timesteps(20)
    got = run(sampler, noise(), sampler.begin(sampler.schedule(20)))
    assert torch.equal(got, run_reference(scheduler, noise()))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize("class_name", [EULER, UNIPC])
@pytest.mark.parametrize("given", [False, True])
def test_dynamic_shift_and_terminal_equal_diffusers(
    class_name: str, kind: str, terminal: float | None, given: bool
) -> None:
    dynamic = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": terminal}
    config = {"_class_name": class_name, **dynamic, **(FLOW if class_name == UNIPC else {})}
    sigmas = np.linspace(1.0, 1 / 7, 7) if given else None
    count = {"sigmas": sigmas} if given else {"num_inference_steps": 7}
    assert_same_trajectory(
        config,
        7,
        begin=lambda scheduler: scheduler.set_timesteps(**count, mu=0.83),
        mu=0.83,
        sigmas=None if sigmas is None else sigmas.tolist(),
    )


@STEPS
@SHIFT
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_diffusers(steps: int, shift: float, order: int) -> None:
    config = {**WAN, "flow_shift": shift, "solver_order": order}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps))


@pytest.mark.parametrize("steps", [3, 20])
@pytest.mark.parametrize("options", [{"disable_corrector": [0, 2]}, {"solver_order": 3, "disable_corrector": [1]}])
def test_unipc_without_some_corrections_equals_diffusers(steps: int, options: dict[str, Any]) -> None:
    assert_same_trajectory({**WAN, **options}, steps, begin=lambda scheduler: scheduler.set_timesteps(steps))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_bh1_equals_diffusers_up_to_the_last_step_where_diffusers_gives_nan(order: int) -> None:
    """bh1 scales by the step size, which is infinite at the last step, where diffusers multiplies it by zero."""
    config = {**WAN, "solver_type": "bh1", "solver_order": order}
    scheduler, sampler = reference(config), build_sampler(config)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(0)
    state = sampler.begin(sampler.schedule(8))
    expected, got = noise()[None], noise()
    for timestep in scheduler.timesteps[:-1]:
        expected = scheduler.step(velocity(expected, timestep.item()), timestep, expected, return_dict=False)[0]
        got = run(sampler, got, state, until=state.step_index + 1)
        assert (got - expected[0]).norm() <= TOLERANCE * expected.norm()
    last = scheduler.timesteps[-1]
    assert scheduler.step(velocity(expected, last.item()), last, expected, return_dict=False)[0].isnan().all()
    assert run(sampler, got, state).isfinite().all()


@STEPS
@SHIFT
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_dpmpp_equals_diffusers(steps: int, shift: float, order: int, solver_type: str) -> None:
    config = {"_class_name": DPMPP, **FLOW, "flow_shift": shift, "solver_order": order, "solver_type": solver_type}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps))


@pytest.mark.parametrize("options", [{"lower_order_final": False}, {"euler_at_final": True}, {"solver_order": 3}])
def test_dpmpp_final_steps_equal_diffusers(options: dict[str, Any]) -> None:
    config = {"_class_name": DPMPP, **FLOW, "flow_shift": 3.0, **options}
    assert_same_trajectory(config, 6, begin=lambda scheduler: scheduler.set_timesteps(6))


def test_dpmpp_dynamic_shift_equals_diffusers() -> None:
    config = {"_class_name": DPMPP, **FLOW, "use_dynamic_shifting": True}
    assert_same_trajectory(config, 9, begin=lambda scheduler: scheduler.set_timesteps(9, mu=1.15), mu=1.15)


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_shift_of_the_request_equals_a_config_with_that_shift(class_name: str) -> None:
    flow = {} if class_name == EULER else FLOW
    field = "shift" if class_name == EULER else "flow_shift"
    config = {"_class_name": class_name, **flow, field: 5.0}
    asked = build_sampler({**config, field: 3.0}).schedule(10, shift=5.0)
    stated = build_sampler(config).schedule(10)
    assert torch.equal(asked.sigmas, stated.sigmas)
    assert torch.equal(asked.timesteps, stated.timesteps)


def all_samplers() -> list[Sampler]:
    configs = [{"_class_name": EULER, "shift": 3.0}, {**WAN, "solver_order": 3}, {**WAN, "_class_name": DPMPP}]
    return [build_sampler(config) for config in configs]


@pytest.mark.parametrize("sampler", all_samplers(), ids=CLASSES)
def test_requests_that_take_turns_get_the_bits_they_get_alone(sampler: Sampler) -> None:
    wishes = [(5, 3.0), (9, 1.0), (20, 7.0)]
    alone = [run(sampler, noise(i), sampler.begin(sampler.schedule(n, shift=s))) for i, (n, s) in enumerate(wishes)]
    states = [sampler.begin(sampler.schedule(n, shift=s)) for n, s in wishes]
    latents = [noise(i) for i in range(len(wishes))]
    while not all(state.finished for state in states):
        for i, state in enumerate(states):
            latents[i] = run(sampler, latents[i], state, until=state.step_index + 1)
    for together, expected in zip(latents, alone, strict=True):
        assert torch.equal(together, expected)


@pytest.mark.parametrize("stop", [0, 1, 2, 7])
@pytest.mark.parametrize("sampler", all_samplers(), ids=CLASSES)
def test_a_state_saved_midway_continues_with_equal_bits(sampler: Sampler, stop: int) -> None:
    expected = run(sampler, noise(), sampler.begin(sampler.schedule(8)))
    state = sampler.begin(sampler.schedule(8))
    latents = run(sampler, noise(), state, until=stop)
    saved, shallow = state.state_dict(), copy.copy(state)
    for value in saved.values():
        assert isinstance(value, (Tensor, int, list))
    frozen = {name: [t.clone() for t in value] if isinstance(value, list) else value for name, value in saved.items()}
    at_stop = latents.clone()
    assert torch.equal(run(sampler, latents, state), expected)
    assert torch.equal(run(sampler, at_stop, SamplerState.from_state_dict(frozen)), expected)
    assert torch.equal(run(sampler, at_stop, shallow), expected)
    assert torch.equal(latents, at_stop)  # a step leaves its inputs alone
    for before, after in zip(frozen["history"], saved["history"], strict=True):
        assert torch.equal(before, after)  # and the saved state too


@pytest.mark.parametrize("sampler", all_samplers(), ids=CLASSES)
def test_a_step_computes_in_fp32_whatever_the_network_returns(sampler: Sampler) -> None:
    state = sampler.begin(sampler.schedule(4))
    stepped = sampler.step(noise(1).bfloat16(), noise().bfloat16(), state)
    other = sampler.begin(sampler.schedule(4))
    expected = sampler.step(noise(1).bfloat16().float(), noise().bfloat16().float(), other)
    assert stepped.dtype == torch.float32
    assert torch.equal(stepped, expected)


@pytest.mark.parametrize("sampler", all_samplers(), ids=CLASSES)
def test_history_is_no_longer_than_the_order_needs(sampler: Sampler) -> None:
    state = sampler.begin(sampler.schedule(12))
    run(sampler, noise(), state)
    assert len(state.history) <= 3
    assert state.finished


def test_published_wan_config_with_every_key_is_accepted() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**{k: v for k, v in WAN.items() if k != "_class_name"})
    sampler = build_sampler({"_class_name": UNIPC, "_diffusers_version": "0.33.0", **scheduler.config})
    assert torch.equal(sampler.schedule(4).timesteps, torch.tensor([999.0, 900.0, 750.0, 500.0]))


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_option_of_the_published_class_is_known(class_name: str) -> None:
    config = {k: v for k, v in reference({"_class_name": class_name}).config.items() if k[0] != "_"}
    build_sampler({"_class_name": class_name, **config, **({} if class_name == EULER else FLOW)})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "DDIMScheduler"}, ["_class_name", "DDIMScheduler", *CLASSES]),
        ({}, ["_class_name", "None"]),
        ({"_class_name": EULER, "use_karras_sigmas": True}, ["use_karras_sigmas", "True", "False"]),
        ({"_class_name": EULER, "invert_sigmas": True}, ["invert_sigmas", "True"]),
        ({"_class_name": EULER, "time_shift_type": "cubic"}, ["time_shift_type", "cubic", "linear"]),
        ({"_class_name": EULER, "shift": "3"}, ["shift", "3", "number"]),
        ({"_class_name": EULER, "speed": 2}, ["speed", "2", "shift_terminal"]),
        ({**WAN, "prediction_type": "epsilon"}, ["prediction_type", "epsilon", "flow_prediction"]),
        ({"_class_name": UNIPC, "prediction_type": "flow_prediction"}, ["use_flow_sigmas", "missing"]),
        ({**WAN, "solver_order": 4}, ["solver_order", "4", "3"]),
        ({**WAN, "solver_p": "DDIM"}, ["solver_p", "DDIM"]),
        ({**WAN, "predict_x0": False}, ["predict_x0", "False"]),
        ({**WAN, "lower_order_final": False}, ["lower_order_final", "solver_order"]),
        ({**WAN, "disable_corrector": ["a"]}, ["disable_corrector", "list of integers"]),
        ({**WAN, "_class_name": DPMPP, "algorithm_type": "sde-dpmsolver++"}, ["algorithm_type", "sde-dpmsolver++"]),
        ({**WAN, "_class_name": DPMPP, "final_sigmas_type": "sigma_min"}, ["final_sigmas_type", "sigma_min", "zero"]),
    ],
)
def test_an_option_that_is_not_implemented_is_named(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build_sampler(config)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("config", "steps", "wishes", "param"),
    [
        (WAN, 0, {}, "num_inference_steps"),
        (WAN, 4, {"shift": float("nan")}, "flow_shift"),
        (WAN, 4, {"shift": -1.0}, "flow_shift"),
        (WAN, 4, {"shift": 1e9}, "num_inference_steps"),
        (WAN, 4, {"mu": 1.0}, "mu"),
        ({**WAN, "use_dynamic_shifting": True}, 4, {}, "mu"),
        ({**WAN, "use_dynamic_shifting": True}, 4, {"mu": 1.0, "shift": 2.0}, "flow_shift"),
        (WAN, 3, {"sigmas": [1.0, 0.5]}, "sigmas"),
        (WAN, 2, {"sigmas": [1.5, 0.5]}, "sigmas"),
        (WAN, 2, {"sigmas": [0.5, 0.5]}, "num_inference_steps"),
        ({**WAN, "_class_name": DPMPP}, 2, {"sigmas": [1.0, 0.5]}, "sigmas"),
        ({"_class_name": EULER, "shift_terminal": 0.1}, 1, {}, "num_inference_steps"),
    ],
)
def test_a_schedule_that_cannot_be_sampled_is_refused(
    config: dict[str, Any], steps: int, wishes: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build_sampler(config).schedule(steps, **wishes)
    assert caught.value.param == param


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("own", [WAN, {"_class_name": EULER, "shift": 3.0}])
def test_a_sampler_chosen_by_name_keeps_the_model_s_shift(name: str, own: dict[str, Any]) -> None:
    config = {"_class_name": NAMES[name], ("shift" if name == "euler" else "flow_shift"): 3.0}
    expected = build_sampler(config | ({} if name == "euler" else FLOW)).schedule(6)
    sampler = sampler_with_name(name, own)
    assert isinstance(sampler, CLASSES[NAMES[name]])
    assert torch.equal(sampler.schedule(6).sigmas, expected.sigmas)


def test_naming_the_checkpoint_s_own_sampler_keeps_its_options() -> None:
    sampler = sampler_with_name("unipc", {**WAN, "solver_order": 3})
    assert sampler.schedule(4).num_inference_steps == 4
    state = sampler.begin(sampler.schedule(8))
    run(sampler, noise(), state, until=4)
    assert state.order == 3


def test_a_sampler_name_that_does_not_exist_or_cannot_serve_the_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="scheduler: got ddim, accepted is one of euler, unipc, dpmpp_2m"):
        sampler_with_name("ddim", WAN)
    with pytest.raises(InvalidRequest, match="shift_terminal"):
        sampler_with_name("dpmpp_2m", {"_class_name": EULER, "shift_terminal": 0.1})
    with pytest.raises(InvalidRequest, match="flow_prediction"):
        sampler_with_name("euler", {**WAN, "prediction_type": "epsilon"})
