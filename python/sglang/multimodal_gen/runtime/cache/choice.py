"""Which rule a request's parameters ask for, checked against the transformer that is to follow it."""

from __future__ import annotations

from sglang.multimodal_gen.configs.sample.cache_params import (
    CacheParams,
    FirstBlockSettings,
    TeaCacheSettings,
    check_caches,
    first_block_settings,
    teacache_settings,
)
from sglang.multimodal_gen.configs.teacache import TeaCacheFit
from sglang.multimodal_gen.errors import InvalidValue, MissingParameter
from sglang.multimodal_gen.registry import entries, load_config
from sglang.multimodal_gen.runtime.cache.rules import CacheRule, FirstBlockRule, TeaCacheRule
from sglang.multimodal_gen.runtime.layers.block_runner import BlockRunner


def wants_cache(params: CacheParams) -> str | None:
    """The parameter that asks for a step cache, if one does. Raises IncompatibleParameters."""
    check_caches(params)
    if params.enable_cache_dit:
        return "enable_cache_dit"
    return "enable_teacache" if params.enable_teacache else None


def rule_for(params: CacheParams, runner: BlockRunner, *, fit: TeaCacheFit | None, num_steps: int) -> CacheRule | None:
    """The rule of a request of so many steps; None without a cache. `fit` is the model's.

    Raises: InvalidRequest naming the key, its value and what this model accepts.
    """
    wanted = wants_cache(params)
    if wanted == "enable_cache_dit":
        return _first_block_rule(first_block_settings(params.cache_dit_params), runner)
    if wanted == "enable_teacache":
        return _teacache_rule(teacache_settings(params.teacache_params), runner, fit=fit, num_steps=num_steps)
    return None


def _first_block_rule(settings: FirstBlockSettings, runner: BlockRunner) -> FirstBlockRule:
    first, last = settings.Fn_compute_blocks, settings.Bn_compute_blocks
    if first >= runner.num_blocks:
        accepted = f"an integer from 1 to {runner.num_blocks - 1}: this model has {runner.num_blocks} blocks"
        if runner.num_blocks == 1:
            accepted = "no first-block cache: this model has one block"
        raise InvalidValue("cache_dit_params.Fn_compute_blocks", first, accepted)
    if last and runner.changes_text:
        raise InvalidValue(
            "cache_dit_params.Bn_compute_blocks", last, "0: this model's blocks change the text too, which is not kept"
        )
    most = runner.num_blocks - first - 1
    if last > most:
        accepted = f"an integer from 0 to {most}: of the model's {runner.num_blocks} blocks {first} run in front"
        raise InvalidValue("cache_dit_params.Bn_compute_blocks", last, accepted)
    return FirstBlockRule(settings)


def _teacache_rule(
    settings: TeaCacheSettings, runner: BlockRunner, *, fit: TeaCacheFit | None, num_steps: int
) -> TeaCacheRule:
    if settings.use_ret_steps and len(runner.signals) == 1:
        raise InvalidValue(
            "teacache_params.use_ret_steps", True, "false: this model watches the first block's input, not the timestep"
        )
    fitted = None if fit is None else fit.modulation_coefficients if settings.use_ret_steps else fit.coefficients
    coefficients = settings.coefficients or fitted
    if coefficients is None:
        raise MissingParameter(
            "teacache_params.coefficients: not given, and none are published for this model; accepted are a list of "
            f"numbers, or a model that has them: {', '.join(fitted_models())}",
            param="teacache_params.coefficients",
        )
    threshold = settings.teacache_thresh
    if threshold is None:
        if fit is None:
            raise MissingParameter(
                "teacache_params.teacache_thresh: not given, and none is published for this model; accepted is a "
                "number of at least 0",
                param="teacache_params.teacache_thresh",
            )
        threshold = fit.threshold
    return TeaCacheRule(
        threshold=threshold,
        coefficients=coefficients,
        start=_step(settings.start_skipping, num_steps),
        end=_step(settings.end_skipping, num_steps),
        signal=runner.signals[1 if settings.use_ret_steps else 0],
    )


def _step(place: int | float, num_steps: int) -> int:
    """A step that was given by its number, from the end, or as a share of the steps."""
    if isinstance(place, float):
        return round(place * num_steps)
    return place if place >= 0 else max(0, num_steps + place)


def fitted_models() -> tuple[str, ...]:
    """The hub ids of the models with published coefficients."""
    return tuple(
        hub_id
        for entry in entries()
        if entry.needs_checkpoint and load_config(entry).teacache is not None
        for hub_id in entry.hub_ids
    )
