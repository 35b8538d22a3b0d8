"""Step caches: what a request may say of them. Both are off unless it asks, or the environment does.

The keys of the two objects are declared here, each once, like parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.declare import FROM_MODEL, Parameter, arg, checked_keys, from_text, parameters
from sglang.multimodal_gen.errors import FieldError, IncompatibleParameters


def _place_problem(value: int | float) -> str | None:
    """What would be accepted instead of a step that is given as a number or as a share of the steps."""
    if isinstance(value, float) and not 0 <= value <= 1:
        return "an integer, or a share of the steps from 0.0 to 1.0"
    return None


@dataclass(frozen=True, kw_only=True)
class FirstBlockSettings:
    """Settings of the first-block cache."""

    Fn_compute_blocks: int = arg(
        1, help="Blocks in front that run at every step; how their output changes decides.", group="cache", minimum=1
    )
    Bn_compute_blocks: int = arg(
        0,
        help="Blocks at the end that run at every step; only of models whose blocks leave the text alone.",
        group="cache",
        minimum=0,
    )
    max_warmup_steps: int = arg(4, help="Steps at the start that are computed.", group="cache", minimum=0)
    residual_diff_threshold: float = arg(
        0.24,
        help="A step is skipped while what the blocks in front add has changed by less than this share; 0 skips none.",
        group="cache",
        minimum=0.0,
    )
    max_continuous_cached_steps: int = arg(
        3, help="Steps that may be skipped one after another; -1 sets no limit.", group="cache", minimum=-1
    )
    enable_taylorseer: bool = arg(
        False,
        help="Predict what a skipped step would have added from those that were computed, in place of repeating the "
        "last (arXiv:2503.06923).",
        group="cache",
    )
    taylorseer_order: int = arg(
        1, help="Highest difference in that prediction; each takes memory.", group="cache", minimum=1, maximum=4
    )


@dataclass(frozen=True, kw_only=True)
class TeaCacheSettings:
    """Settings of TeaCache."""

    teacache_thresh: float | None = arg(
        None,
        help="Steps are skipped until the changes of the watched signal add up to this; 0 skips none.",
        group="cache",
        unset=FROM_MODEL,
        minimum=0.0,
    )
    start_skipping: int | float = arg(
        5,
        help="The first step, from 0, that may be skipped; a share of the steps when it is written with a point.",
        group="cache",
        check=_place_problem,
    )
    end_skipping: int | float = arg(
        -1,
        help="From this step on all are computed; likewise, and negative ones count from the end.",
        group="cache",
        check=_place_problem,
    )
    coefficients: tuple[float, ...] | None = arg(
        None,
        help="Polynomial, of the highest power first, that makes of the signal's relative change how much the output "
        "changes.",
        group="cache",
        unset=FROM_MODEL,
    )
    use_ret_steps: bool = arg(
        False,
        help="Watch what is made of the timestep for the blocks in place of its embedding, of models that watch the "
        "timestep alone.",
        group="cache",
    )


@dataclass(frozen=True, kw_only=True)
class CacheParams:
    """Which steps are computed and which take over what an earlier one found."""

    enable_cache_dit: bool | None = arg(
        None,
        help="First-block cache: skip the other blocks at steps where the first ones change little.",
        group="cache",
        unset="as SGLANG_CACHE_DIT_ENABLED says, else off",
        recorded=True,
    )
    cache_dit_params: Mapping[str, Any] | None = arg(
        None,
        help="Settings of the first-block cache; see the page on step caches.",
        group="cache",
        unset="those of the environment, else the defaults",
        keys=FirstBlockSettings,
        recorded=True,
    )
    enable_teacache: bool = arg(
        False,
        help="TeaCache: skip all blocks at steps where the timestep changes little.",
        group="cache",
        recorded=True,
    )
    teacache_params: Mapping[str, Any] | None = arg(
        None,
        help="Settings of TeaCache; see the page on step caches.",
        group="cache",
        unset=FROM_MODEL,
        keys=TeaCacheSettings,
        recorded=True,
    )


_PAIRS = (("enable_cache_dit", "cache_dit_params"), ("enable_teacache", "teacache_params"))
Defaults = TypeVar("Defaults", bound=CacheParams)


def first_block_settings(values: Mapping[str, Any] | None) -> FirstBlockSettings:
    """Of `cache_dit_params`. Raises UnknownParameter, InvalidType or InvalidValue, which name the key."""
    return FirstBlockSettings(**checked_keys(FirstBlockSettings, "cache_dit_params", values or {}))


def teacache_settings(values: Mapping[str, Any] | None) -> TeaCacheSettings:
    """Of `teacache_params`. Raises UnknownParameter, InvalidType or InvalidValue, which name the key."""
    return TeaCacheSettings(**checked_keys(TeaCacheSettings, "teacache_params", values or {}))


def check_caches(params: CacheParams) -> None:
    """Raises IncompatibleParameters for both caches at once, and for settings of one that is off."""
    if params.enable_cache_dit and params.enable_teacache:
        raise IncompatibleParameters(
            "enable_teacache: the request has enable_cache_dit too, accepted is one of them", param="enable_teacache"
        )
    for switch, settings in _PAIRS:
        if getattr(params, settings) is not None and not getattr(params, switch):
            raise IncompatibleParameters(
                f"{settings}: says how a cache works that is off, accepted is {settings} with {switch}", param=settings
            )


def filled_caches(wish: CacheParams, defaults: Sequence[CacheParams]) -> dict[str, Any]:
    """The fields of CacheParams that defaults fill: of a cache that is on, each key that the wish leaves open.

    Who asks for one cache does not get the other one from the defaults.
    """
    found: dict[str, Any] = {}
    if wish.enable_cache_dit is None and not wish.enable_teacache:
        enabled = next((d.enable_cache_dit for d in defaults if d.enable_cache_dit is not None), None)
        if enabled is not None:
            found["enable_cache_dit"] = enabled
    for switch, name in _PAIRS:
        if found.get(switch, getattr(wish, switch)):
            merged: dict[str, Any] = {}
            for source in (*reversed(defaults), wish):
                merged |= getattr(source, name) or {}
            if merged:
                found[name] = merged
    return found


def with_environment(defaults: Defaults, environ: Mapping[str, str]) -> Defaults:
    """A model's defaults with what the environment says of the first-block cache.

    Raises: InvalidType or InvalidValue naming the variable.
    """
    enabled = _from_environment(environ, envs.CACHE_ENABLED, parameters(CacheParams)["enable_cache_dit"])
    known, found = parameters(FirstBlockSettings), {}
    for variable, key in envs.CACHE_VARIABLES.items():
        value = _from_environment(environ, variable, known[key])
        if value is not None:
            found[key] = value
    if enabled is not None:
        defaults = dataclasses.replace(defaults, enable_cache_dit=enabled)
    if found:
        defaults = dataclasses.replace(defaults, cache_dit_params={**(defaults.cache_dit_params or {}), **found})
    return defaults


def _from_environment(environ: Mapping[str, str], variable: str, parameter: Parameter) -> Any:
    """None where the variable is empty or not set."""
    text = environ.get(variable)
    if not text:
        return None
    try:
        return from_text(parameter, text)
    except FieldError as error:
        raise error.named(variable) from None


def without_unused(values: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded parameters without switches that are off."""
    return {name: value for name, value in values.items() if value or name not in dict(_PAIRS)}
