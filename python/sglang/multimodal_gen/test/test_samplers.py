"""Samplers against diffusers' schedulers, and what the engine asks of their state."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.configs.schedulers import SCHEDULER_NAMES
from sglang.multimodal_gen.errors import InvalidRequest
from sglang.multimodal_gen.runtime.models.schedulers import (
    CLASSES,
    NAMES,
    Sampler,
    SamplerState,
    build_sampler,
    sampler_with_name,
)
from sglang.multimodal_gen.runtime.models.schedulers.spacing import beta_quantiles
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.timestep_preparation import TimestepPreparationStage

# diffusers converts a tensor with np.array() in DPMSolverMultistepScheduler.set_timesteps.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

EULER, UNIPC, DPMPP, LCM, FLOW_UNIPC = CLASSES
IN_DIFFUSERS = (EULER, UNIPC, DPMPP, LCM)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
WAN = {"_class_name": UNIPC, **FLOW, "flow_shift": 3.0}
KARRAS = {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}
SHAPE = (4, 3, 6, 5)  # C, T, H, W

# fp32 throughout: diffusers rounds its scalars to fp32 where ours are float64, and sums in another order. Measured
# worst case over all trajectories below: 1.4e-6, of third order over a long last step; else 4e-7.
TOLERANCE = 2e-6


def velocity(latents: Tensor, timestep: float) -> Tensor:
    """A stand-in for the network: nonlinear in the sample, different at each step."""
    return torch.tanh(1.3 * latents + 0.002 * timestep) - 0.4 * latents.roll(1, dims=-1)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(
    sampler: Sampler,
    latents: Tensor,
    state: SamplerState,
    *,
    until: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`generator` None: a fresh one with the seed that `run_reference` has."""
    generator = seeded() if generator is None else generator
    while not state.finished and state.step_index != until:
        latents = sampler.step(velocity(latents, state.timestep), latents, state, generator=generator)
    return latents


def reference(config: dict[str, Any]) -> Any:
    return getattr(diffusers, config["_class_name"]).from_config(config)


def run_reference(scheduler: Any, latents: Tensor, *, first_step: int = 0) -> Tensor:
    """As diffusers' pipelines do it, which hand the generator only to schedulers that take one."""
    scheduler.set_begin_index(first_step)
    extra = {} if isinstance(scheduler, diffusers.UniPCMultistepScheduler) else {"generator": seeded()}
    latents = latents[None]
    for timestep in scheduler.timesteps[first_step:]:
        v = velocity(latents, timestep.item())
        latents = scheduler.step(v, timestep, latents, return_dict=False, **extra)[0]
    return latents[0]


def assert_close(got: Tensor, expected: Tensor) -> None:
    error = (got - expected).norm() / expected.norm()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


def assert_same_trajectory(
    config: dict[str, Any],
    steps: int,
    *,
    begin: Callable[[Any], None],
    strength: float = 1.0,
    first_step: int = 0,
    exact: bool = False,
    **wishes: Any,
) -> None:
    scheduler, sampler = reference(config), build_sampler(config)
    begin(scheduler)
    schedule = sampler.schedule(steps, **wishes)
    assert schedule.timesteps.dtype == schedule.sigmas.dtype == torch.float32
    assert torch.equal(schedule.timesteps, scheduler.timesteps.float())
    assert torch.equal(schedule.sigmas, scheduler.sigmas)
    state = sampler.begin(schedule, strength=strength)
    assert (state.first_step, state.step_index, state.num_steps) == (first_step, first_step, steps - first_step)
    expected = run_reference(scheduler, noise(), first_step=first_step)
    got = run(sampler, noise(), state)
    assert state.finished
    if exact:
        assert torch.equal(got, expected)
    assert_close(got, expected)


STEPS = pytest.mark.parametrize("steps", [1, 2, 3, 5, 14, 20])
SHIFT = pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])


@STEPS
@SHIFT
def test_euler_equals_diffusers(steps: int, shift: float) -> None:
    config = {"_class_name": EULER, "shift": shift}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 0.95},
        {"use_exponential_sigmas": True},
        {"use_exponential_sigmas": True, "shift_terminal": 0.1},
        {"invert_sigmas": True},
        {"invert_sigmas": True, "use_karras_sigmas": True},
        {"stochastic_sampling": True},
        {"stochastic_sampling": True, "use_exponential_sigmas": True},
    ],
)
@pytest.mark.parametrize("steps, shift", [(2, 3.0), (7, 1.0), (20, 3.0)])
def test_euler_equals_diffusers_to_the_bit(options: dict[str, Any], steps: int, shift: float) -> None:
    config = {"_class_name": EULER, "shift": shift, **options}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps), exact=True)


@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("class_name", [EULER, LCM])
def test_a_spacing_after_a_dynamic_shift_equals_diffusers(spacing: str, given: bool, class_name: str) -> None:
    config = {"_class_name": class_name, "use_dynamic_shifting": True, "shift_terminal": 0.02, spacing: True}
    sigmas = np.linspace(1.0, 1 / 7, 7) if given else None
    count = {"sigmas": sigmas} if given else {"num_inference_steps": 7}
    assert_same_trajectory(
        config,
        7,
        begin=lambda scheduler: scheduler.set_timesteps(**count, mu=0.83),
        exact=True,
        mu=0.83,
        sigmas=None if sigmas is None else sigmas.tolist(),
    )


def quantile(probability: float, a: float, b: float) -> float:
    """Where the Beta distribution reaches it: an implementation that shares nothing with ours."""
    if probability in (0.0, 1.0):
        return float(probability)
    with mpmath.workdps(25):
        cdf = lambda x: mpmath.betainc(a, b, 0, x, regularized=True) - probability  # noqa: E731
        return float(mpmath.findroot(cdf, (0, 1), solver="bisect", tol=1e-18, maxsteps=100))


@pytest.mark.parametrize("shape", [0.6, 0.5, 1.0, 2.5])
def test_beta_quantiles_are_right_to_12_digits(shape: float) -> None:
    probabilities = np.array([0.0, 1e-6, 0.001, 0.02, 0.25, 0.499, 0.5, 0.51, 0.75, 0.98, 0.999, 1 - 1e-6, 1.0])
    expected = [quantile(float(p), shape, shape) for p in probabilities]
    np.testing.assert_allclose(beta_quantiles(probabilities, shape=shape), expected, rtol=1e-12, atol=1e-15)


def test_beta_quantiles_of_a_shape_with_a_formula() -> None:
    probabilities = np.linspace(0, 1, 101)
    expected = np.sin(np.pi * probabilities / 2) ** 2  # the arcsine distribution
    np.testing.assert_allclose(beta_quantiles(probabilities, shape=0.5), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("class_name", [EULER, LCM])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_beta_spacing_equals_diffusers(class_name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers takes the quantiles from scipy, which is no dependency; here they come from mpmath."""
    module = sys.modules[getattr(diffusers, class_name).__module__]
    scipy = SimpleNamespace(stats=SimpleNamespace(beta=SimpleNamespace(ppf=quantile)))
    monkeypatch.setattr(module, "is_scipy_available", lambda: True)
    monkeypatch.setattr(module, "scipy", scipy, raising=False)
    config = {"_class_name": class_name, "shift": 3.0, "use_beta_sigmas": True}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps), exact=True)


@STEPS
@SHIFT
def test_lcm_equals_diffusers_to_the_bit(steps: int, shift: float) -> None:
    config = {"_class_name": LCM, "shift": shift}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps), exact=True)


STRENGTHS = [(0.01, 9), (0.3, 7), (0.55, 4), (0.99, 0), (1.0, 0)]


@pytest.mark.parametrize("strength, first_step", STRENGTHS)
@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": EULER, "shift": 3.0},
        {"_class_name": LCM, "shift": 3.0},
        {**WAN, "solver_order": 3},
        {"_class_name": DPMPP, **FLOW, "flow_shift": 3.0, "solver_order": 3},
        {"_class_name": DPMPP, **FLOW, "flow_shift": 3.0, "algorithm_type": "sde-dpmsolver++"},
    ],
)
def test_a_start_in_the_middle_equals_diffusers(config: dict[str, Any], strength: float, first_step: int) -> None:
    """A fresh history there, and the last steps' order counted from the end of the whole schedule."""
    pipeline = SimpleNamespace(scheduler=reference(config))
    pipeline.scheduler.set_timesteps(10)
    diffusers.FluxImg2ImgPipeline.get_timesteps(pipeline, 10, strength, "cpu")
    assert pipeline.scheduler.begin_index == first_step
    assert_same_trajectory(
        config, 10, begin=lambda scheduler: scheduler.set_timesteps(10), strength=strength, first_step=first_step
    )


@pytest.mark.parametrize("steps", [1, 4, 7, 50])
def test_a_start_rounds_as_diffusers_pipelines_do(steps: int) -> None:
    sampler = build_sampler(WAN)
    schedule = sampler.schedule(steps)
    pipeline = SimpleNamespace(scheduler=reference(WAN))
    pipeline.scheduler.set_timesteps(steps)
    timesteps = pipeline.scheduler.timesteps
    for strength in np.linspace(0.0, 1.0, 51).tolist():
        up = len(diffusers.FluxImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")[0])
        down = len(diffusers.WanVideoToVideoPipeline.get_timesteps(pipeline, steps, timesteps, strength, "cpu")[0])
        for wanted, round_down in ((up, False), (down, True)):
            if wanted:
                assert sampler.begin(schedule, strength=strength, round_down=round_down).num_steps == wanted
            else:
                with pytest.raises(InvalidRequest, match=f"strength: {strength} of num_inference_steps {steps} "):
                    sampler.begin(schedule, strength=strength, round_down=round_down)


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan")])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    sampler = build_sampler(WAN)
    with pytest.raises(InvalidRequest, match=r"strength: got .*, accepted is a number from 0 to 1"):
        sampler.begin(sampler.schedule(4), strength=strength)


@pytest.mark.parametrize("class_name", IN_DIFFUSERS)
def test_added_noise_equals_diffusers_before_and_between_steps(class_name: str) -> None:
    config = {"_class_name": class_name, **({} if class_name in (EULER, LCM) else FLOW)}
    scheduler, sampler = reference(config), build_sampler(config)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(3)
    state = sampler.begin(sampler.schedule(8), strength=0.625)
    expected, got = noise()[None], noise()
    extra = {} if class_name == UNIPC else {"generator": seeded()}
    generator = seeded()
    for timestep in scheduler.timesteps[3:]:
        clean, fresh = noise(5), noise(6)
        if class_name in (EULER, LCM):
            noised = scheduler.scale_noise(clean[None], timestep[None], fresh[None])
        else:
            noised = scheduler.add_noise(clean[None], fresh[None], timestep[None])
        assert torch.equal(sampler.add_noise(clean, fresh, state), noised[0])
        v = velocity(expected, timestep.item())
        expected = scheduler.step(v, timestep, expected, return_dict=False, **extra)[0]
        got = run(sampler, got, state, until=state.step_index + 1, generator=generator)
    assert torch.equal(sampler.add_noise(clean, fresh, state), clean)


def test_an_inverted_schedule_adds_as_much_noise_as_the_plain_one() -> None:
    plain, inverted = build_sampler(STATIC), build_sampler(INVERTED)
    states = [sampler.begin(sampler.schedule(5), strength=0.6) for sampler in (plain, inverted)]
    assert states[1].noise_level == pytest.approx(states[0].noise_level)
    assert_close(inverted.add_noise(noise(1), noise(2), states[1]), plain.add_noise(noise(1), noise(2), states[0]))


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


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 16])
def test_unipc_that_ends_at_its_last_level_equals_diffusers(lower_order_final: bool, order: int, steps: int) -> None:
    """The last step only corrects. Of third order without the lower orders at the end, diffusers gives NaN."""
    config = {**WAN, "final_sigmas_type": "sigma_min", "lower_order_final": lower_order_final, "solver_order": order}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps))


def test_unipc_of_first_order_to_the_end_equals_diffusers() -> None:
    config = {**WAN, "lower_order_final": False, "solver_order": 1}
    assert_same_trajectory(config, 6, begin=lambda scheduler: scheduler.set_timesteps(6))


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps, order", [(1, 2), (2, 2), (20, 2), (5, 1), (9, 3)])
def test_unipc_on_karras_levels_equals_diffusers(final: str, order: int, steps: int) -> None:
    karras = {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0, "final_sigmas_type": final}
    config = {**WAN, **karras, "solver_order": order}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps))


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


@STEPS
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("order, solver_type", [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_dpmpp_sde_equals_diffusers_given_an_equal_generator(
    steps: int, shift: float, order: int, solver_type: str
) -> None:
    options = {"flow_shift": shift, "solver_order": order, "solver_type": solver_type}
    config = {"_class_name": DPMPP, **FLOW, **options, "algorithm_type": "sde-dpmsolver++"}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps))


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize(
    "end",
    [
        {"euler_at_final": True},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"final_sigmas_type": "sigma_min", "beta_start": 0.00085},
    ],
)
@pytest.mark.parametrize("order, steps", [(2, 2), (2, 16), (3, 6), (3, 16)])
def test_dpmpp_final_steps_equal_diffusers(
    algorithm: str, lower_order_final: bool, end: dict[str, Any], order: int, steps: int
) -> None:
    options = {"algorithm_type": algorithm, "lower_order_final": lower_order_final, "solver_order": order, **end}
    config = {"_class_name": DPMPP, **FLOW, "flow_shift": 3.0, **options}
    assert_same_trajectory(config, steps, begin=lambda scheduler: scheduler.set_timesteps(steps))


def test_dpmpp_dynamic_shift_equals_diffusers() -> None:
    config = {"_class_name": DPMPP, **FLOW, "use_dynamic_shifting": True}
    assert_same_trajectory(config, 9, begin=lambda scheduler: scheduler.set_timesteps(9, mu=1.15), mu=1.15)


def flow_unipc_sigmas(steps: int, *, shift: float = 1.0, mu: float | None = None) -> Tensor:
    """The published formula: training levels shifted, then an even spacing from the highest, shifted again."""
    training = torch.from_numpy(1.0 - np.linspace(1, 1 / 1000, 1000)[::-1].copy()).float()
    if mu is None:
        training = shift * training / (1 + (shift - 1) * training)
    levels = np.linspace(training[0].item(), training[-1].item(), steps + 1)[:-1]
    strength = shift if mu is None else np.exp(mu)
    return torch.from_numpy(np.append(strength * levels / (1 + (strength - 1) * levels), 0.0))


@pytest.mark.parametrize("steps, order", [(1, 2), (4, 2), (20, 2), (9, 1), (9, 3)])
@pytest.mark.parametrize("wish", [{"shift": 1.0}, {"shift": 3.0}, {"shift": 12.0}, {"mu": 1.15}])
def test_flow_unipc_equals_diffusers_solver_on_the_published_schedule(
    steps: int, order: int, wish: dict[str, Any]
) -> None:
    sigmas = flow_unipc_sigmas(steps, **wish)
    scheduler = reference({**WAN, "solver_order": order})
    scheduler.set_timesteps(steps)
    scheduler.sigmas, scheduler.timesteps = sigmas.float(), (sigmas[:-1] * 1000).long()
    config = {"_class_name": FLOW_UNIPC, "solver_order": order, "use_dynamic_shifting": "mu" in wish}
    sampler = build_sampler(config)
    schedule = sampler.schedule(steps, **wish)
    torch.testing.assert_close(schedule.sigmas, scheduler.sigmas, rtol=1e-6, atol=0)
    assert torch.equal(schedule.timesteps, scheduler.timesteps.float())
    assert_close(run(sampler, noise(), sampler.begin(schedule)), run_reference(scheduler, noise()))


def test_flow_unipc_truncates_its_timesteps() -> None:
    sampler = build_sampler({"_class_name": FLOW_UNIPC, "shift": 3.0})
    assert sampler.schedule(4).timesteps.tolist() == [999, 899, 749, 499]


def test_flow_unipc_survives_a_shift_that_rounds_its_first_level_to_one() -> None:
    sampler = build_sampler({"_class_name": FLOW_UNIPC, "use_dynamic_shifting": True})
    state = sampler.begin(sampler.schedule(3, mu=13.0))
    assert state.sigma() < 1
    assert run(sampler, noise(), state).isfinite().all()


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_shift_of_the_request_equals_a_config_with_that_shift(class_name: str) -> None:
    flow = FLOW if class_name in (UNIPC, DPMPP) else {}
    field = CLASSES[class_name].shift_option
    config = {"_class_name": class_name, **flow, field: 5.0}
    asked = build_sampler({**config, field: 3.0}).schedule(10, shift=5.0)
    stated = build_sampler(config).schedule(10)
    assert torch.equal(asked.sigmas, stated.sigmas)
    assert torch.equal(asked.timesteps, stated.timesteps)


SAMPLERS = {
    EULER: build_sampler({"_class_name": EULER, "shift": 3.0}),
    UNIPC: build_sampler({**WAN, "solver_order": 3}),
    DPMPP: build_sampler({**WAN, "_class_name": DPMPP, "solver_order": 3}),
    "SDE": build_sampler({**WAN, "_class_name": DPMPP, "algorithm_type": "sde-dpmsolver++"}),
    LCM: build_sampler({"_class_name": LCM, "shift": 3.0}),
    FLOW_UNIPC: build_sampler({"_class_name": FLOW_UNIPC, "shift": 3.0}),
}
EACH_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@EACH_SAMPLER
def test_requests_that_take_turns_get_the_bits_they_get_alone(sampler: Sampler) -> None:
    wishes = [(5, 3.0, 1.0), (9, 1.0, 0.7), (20, 7.0, 1.0)]

    def state_of(steps: int, shift: float, strength: float) -> SamplerState:
        return sampler.begin(sampler.schedule(steps, shift=shift), strength=strength)

    alone = [run(sampler, noise(i), state_of(*wish), generator=seeded(i)) for i, wish in enumerate(wishes)]
    states, generators = [state_of(*wish) for wish in wishes], [seeded(i) for i in range(len(wishes))]
    latents = [noise(i) for i in range(len(wishes))]
    while not all(state.finished for state in states):
        for i, state in enumerate(states):
            latents[i] = run(sampler, latents[i], state, until=state.step_index + 1, generator=generators[i])
    for together, expected in zip(latents, alone, strict=True):
        assert torch.equal(together, expected)


@pytest.mark.parametrize("strength", [1.0, 0.75])
@pytest.mark.parametrize("stop", [0, 1, 2, 5])
@EACH_SAMPLER
def test_a_state_saved_midway_continues_with_equal_bits(sampler: Sampler, stop: int, strength: float) -> None:
    expected = run(sampler, noise(), sampler.begin(sampler.schedule(8), strength=strength))
    state, generator = sampler.begin(sampler.schedule(8), strength=strength), seeded()
    latents = run(sampler, noise(), state, until=state.first_step + stop, generator=generator)
    saved, shallow = state.state_dict(), copy.copy(state)
    for value in saved.values():
        assert isinstance(value, (Tensor, int, list))
    frozen = {name: [t.clone() for t in value] if isinstance(value, list) else value for name, value in saved.items()}
    at_stop = latents.clone()
    again = SamplerState.from_state_dict(frozen)
    assert (again.first_step, again.num_steps) == (state.first_step, state.num_steps)
    assert torch.equal(run(sampler, latents, state, generator=generator.clone_state()), expected)
    assert torch.equal(run(sampler, at_stop, again, generator=generator.clone_state()), expected)
    assert torch.equal(run(sampler, at_stop, shallow, generator=generator.clone_state()), expected)
    assert torch.equal(latents, at_stop)  # a step leaves its inputs alone
    for before, after in zip(frozen["history"], saved["history"], strict=True):
        assert torch.equal(before, after)  # and the saved state too


@EACH_SAMPLER
def test_only_samplers_that_draw_noise_move_the_generator(sampler: Sampler) -> None:
    generator = seeded()
    sampler.step(noise(1), noise(), sampler.begin(sampler.schedule(4)), generator=generator)
    assert sampler.draws_noise != torch.equal(generator.get_state(), seeded().get_state())


def test_a_sampler_that_draws_noise_insists_on_a_generator() -> None:
    sampler = SAMPLERS[LCM]
    with pytest.raises(AssertionError, match="no generator"):
        sampler.step(noise(1), noise(), sampler.begin(sampler.schedule(4)))


@EACH_SAMPLER
def test_a_step_computes_in_fp32_whatever_the_network_returns(sampler: Sampler) -> None:
    state = sampler.begin(sampler.schedule(4))
    stepped = sampler.step(noise(1).bfloat16(), noise().bfloat16(), state, generator=seeded())
    other = sampler.begin(sampler.schedule(4))
    expected = sampler.step(noise(1).bfloat16().float(), noise().bfloat16().float(), other, generator=seeded())
    assert stepped.dtype == torch.float32
    assert torch.equal(stepped, expected)


@EACH_SAMPLER
def test_history_is_no_longer_than_the_order_needs(sampler: Sampler) -> None:
    state = sampler.begin(sampler.schedule(12))
    run(sampler, noise(), state)
    assert len(state.history) <= 3
    assert state.finished


def test_published_wan_config_with_every_key_is_accepted() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**{k: v for k, v in WAN.items() if k != "_class_name"})
    sampler = build_sampler({"_class_name": UNIPC, "_diffusers_version": "0.33.0", **scheduler.config})
    assert torch.equal(sampler.schedule(4).timesteps, torch.tensor([999.0, 900.0, 750.0, 500.0]))


@pytest.mark.parametrize("class_name", IN_DIFFUSERS)
def test_every_option_of_the_published_class_is_known(class_name: str) -> None:
    config = {k: v for k, v in reference({"_class_name": class_name}).config.items() if k[0] != "_"}
    build_sampler({"_class_name": class_name, **config, **(FLOW if class_name in (UNIPC, DPMPP) else {})})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "DDIMScheduler"}, ["_class_name", "DDIMScheduler", *CLASSES]),
        ({}, ["_class_name", "None"]),
        (
            {"_class_name": EULER, "use_karras_sigmas": True, "use_beta_sigmas": True},
            ["use_karras_sigmas", "use_beta_sigmas", "one of them"],
        ),
        ({"_class_name": EULER, "invert_sigmas": True, "stochastic_sampling": True}, ["invert_sigmas", "False"]),
        ({"_class_name": LCM, "invert_sigmas": True}, [LCM, "invert_sigmas", "False"]),
        ({"_class_name": LCM, "scale_factors": [0.5, 1.0]}, [LCM, "scale_factors", "[0.5, 1.0]", "None"]),
        ({"_class_name": LCM, "stochastic_sampling": False}, [LCM, "stochastic_sampling"]),
        ({"_class_name": FLOW_UNIPC, "final_sigmas_type": "sigma_min"}, ["final_sigmas_type", "sigma_min", "zero"]),
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
        ({**WAN, "use_exponential_sigmas": True}, ["use_exponential_sigmas", "True", "False"]),
        ({**WAN, "use_karras_sigmas": True, "sigma_max": 80.0}, ["sigma_min", "None", "use_karras_sigmas"]),
        ({**WAN, "_class_name": DPMPP, "algorithm_type": "dpmsolver"}, ["algorithm_type", "dpmsolver", "sde-"]),
        ({**WAN, "_class_name": DPMPP, "final_sigmas_type": "one"}, ["final_sigmas_type", "one", "zero"]),
        (
            {**WAN, "_class_name": DPMPP, "final_sigmas_type": "sigma_min", "trained_betas": [0.1]},
            ["trained_betas", "[0.1]", "None", "sigma_min"],
        ),
        ({**WAN, "_class_name": DPMPP, "use_karras_sigmas": True}, ["use_karras_sigmas", "True", "False"]),
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
        ({"_class_name": EULER, "use_dynamic_shifting": True, "time_shift_type": "linear"}, 4, {"mu": 0.0}, "mu"),
        (WAN, 3, {"sigmas": [1.0, 0.5]}, "sigmas"),
        (WAN, 2, {"sigmas": [1.5, 0.5]}, "sigmas"),
        (WAN, 2, {"sigmas": [0.5, 0.5]}, "num_inference_steps"),
        ({**WAN, "_class_name": DPMPP}, 2, {"sigmas": [1.0, 0.5]}, "sigmas"),
        ({"_class_name": EULER, "shift_terminal": 0.1}, 1, {}, "num_inference_steps"),
        ({"_class_name": EULER, "use_dynamic_shifting": True, "shift_terminal": 0.1}, 4, {"mu": 60.0}, "num_frames"),
        ({"_class_name": EULER, "invert_sigmas": True}, 2, {"sigmas": [0.5, 0.5]}, "num_inference_steps"),
        ({**WAN, "_class_name": DPMPP, "final_sigmas_type": "sigma_min"}, 500, {}, "num_inference_steps"),
        ({**WAN, **KARRAS}, 4, {"shift": 2.0}, "flow_shift"),
        ({**WAN, **KARRAS}, 4, {"sigmas": [0.9, 0.7, 0.5, 0.3]}, "sigmas"),
    ],
)
def test_a_schedule_that_cannot_be_sampled_is_refused(
    config: dict[str, Any], steps: int, wishes: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build_sampler(config).schedule(steps, **wishes)
    assert caught.value.param == param


# --- names ---

STATIC = {"_class_name": EULER, "shift": 3.0}
DYNAMIC = {"_class_name": EULER, "shift": 3.0, "use_dynamic_shifting": True}
STRETCHED = {**DYNAMIC, "shift_terminal": 0.02}
LINEAR = {**DYNAMIC, "time_shift_type": "linear"}
INVERTED = {**STATIC, "invert_sigmas": True}


def test_the_names_that_options_offer_are_the_samplers_there_are() -> None:
    assert tuple(NAMES) == SCHEDULER_NAMES
    for named in NAMES.values():
        assert named.class_name in CLASSES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("own", [WAN, STATIC, {"_class_name": FLOW_UNIPC, "shift": 3.0}])
def test_a_sampler_chosen_by_name_keeps_the_model_s_shift(name: str, own: dict[str, Any]) -> None:
    named = NAMES[name]
    flow = FLOW if named.class_name in (UNIPC, DPMPP) else {}
    config = {"_class_name": named.class_name, CLASSES[named.class_name].shift_option: 3.0, **flow, **named.options}
    expected = build_sampler(config).schedule(6)
    sampler = sampler_with_name(name, own)
    assert type(sampler) is CLASSES[named.class_name]
    assert torch.equal(sampler.schedule(6).sigmas, expected.sigmas)
    assert sampler.draws_noise == (name in ("dpmpp_2m_sde", "lcm"))


@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_chosen_by_name_takes_the_shift_of_the_size(name: str) -> None:
    sampler = sampler_with_name(name, DYNAMIC)
    low, high = sampler.schedule(6, mu=0.5), sampler.schedule(6, mu=1.15)
    assert (high.sigmas[1:-2] > low.sigmas[1:-2]).all()
    state = sampler.begin(high)
    assert run(sampler, noise(), state).isfinite().all()
    if name in ("unipc", "dpmpp_2m"):
        scheduler = reference({"_class_name": NAMES[name].class_name, **FLOW, "use_dynamic_shifting": True})
        scheduler.set_timesteps(6, mu=1.15)
        assert torch.equal(high.sigmas, scheduler.sigmas)


CANNOT = [
    *((name, STRETCHED, "shift_terminal") for name in ("flow_unipc", "dpmpp_2m", "dpmpp_2m_sde")),
    *((name, LINEAR, "time_shift_type") for name in ("flow_unipc", "dpmpp_2m", "dpmpp_2m_sde")),
    *((name, INVERTED, "invert_sigmas") for name in ("unipc", "flow_unipc", "dpmpp_2m", "dpmpp_2m_sde", "lcm")),
]


@pytest.mark.parametrize("own", [STRETCHED, LINEAR, INVERTED], ids=["terminal", "linear", "inverted"])
@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_that_cannot_do_the_model_s_kind_of_shift_is_refused_with_the_reason(
    name: str, own: dict[str, Any]
) -> None:
    reasons = [reason for refused, config, reason in CANNOT if refused == name and config is own]
    if not reasons:
        assert sampler_with_name(name, own).schedule(5, mu=None if own is INVERTED else 0.9).num_inference_steps == 5
        return
    with pytest.raises(InvalidRequest, match=rf"scheduler: {name} cannot sample this model: .*{reasons[0]}") as caught:
        sampler_with_name(name, own)
    assert caught.value.param == "scheduler"


def test_naming_the_checkpoint_s_own_sampler_keeps_its_options() -> None:
    sampler = sampler_with_name("unipc", {**WAN, "solver_order": 3})
    assert sampler.schedule(4).num_inference_steps == 4
    state = sampler.begin(sampler.schedule(8))
    run(sampler, noise(), state, until=4)
    assert state.order == 3


def test_the_options_that_a_name_says_win_over_the_checkpoint_s() -> None:
    karras = {**STATIC, "use_karras_sigmas": True}
    exponential = build_sampler({**STATIC, "use_exponential_sigmas": True})
    assert torch.equal(
        sampler_with_name("euler_exponential", karras).schedule(6).sigmas, exponential.schedule(6).sigmas
    )
    third_order_sde = {**WAN, "_class_name": DPMPP, "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}
    sampler = sampler_with_name("dpmpp_2m", third_order_sde)
    state = sampler.begin(sampler.schedule(8))
    run(sampler, noise(), state, until=4)
    assert (state.order, sampler.draws_noise) == (2, False)


def test_a_sampler_name_that_does_not_exist_or_cannot_serve_the_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="scheduler: got ddim, accepted is one of euler, euler_karras, "):
        sampler_with_name("ddim", WAN)
    with pytest.raises(InvalidRequest, match="flow_prediction"):
        sampler_with_name("euler", {**WAN, "prediction_type": "epsilon"})


# --- the choice of a request, of the server and of the model ---


def test_a_model_may_restrict_the_samplers_that_requests_choose() -> None:
    stage = TimestepPreparationStage(WAN, schedulers=("euler", "lcm"))
    chosen = Req(request_id="r", params=SamplingParams(num_inference_steps=4, scheduler="lcm"))
    stage.admit(chosen)
    assert type(chosen.sampler) is CLASSES[LCM]
    own = Req(request_id="r", params=SamplingParams(num_inference_steps=4))
    stage.admit(own)
    assert type(own.sampler) is CLASSES[UNIPC]
    with pytest.raises(InvalidRequest, match="scheduler: got unipc, accepted is one of euler, lcm for this model"):
        stage.admit(Req(request_id="r", params=SamplingParams(num_inference_steps=4, scheduler="unipc")))


def test_a_default_sampler_that_cannot_serve_is_refused_when_the_model_loads() -> None:
    with pytest.raises(InvalidRequest, match="scheduler: got unipc, accepted is one of lcm"):
        TimestepPreparationStage(WAN, schedulers=("lcm",), default="unipc")
    with pytest.raises(InvalidRequest, match="scheduler: dpmpp_2m cannot sample this model"):
        TimestepPreparationStage(STRETCHED, default="dpmpp_2m")
