"""Where a model's weights are: options, and what they say of each component."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sglang.multimodal_gen.configs.declare import arg
from sglang.multimodal_gen.errors import InvalidValue

Residency = Literal["resident", "component-offload", "layerwise-offload"]
RESIDENCIES: tuple[Residency, ...] = get_args(Residency)
PERFORMANCE_MODES = ("auto", "speed", "memory", "manual")
_GROUPS = {"dit": "transformer", "text_encoder": "text_encoder", "image_encoder": "image_encoder", "vae": "vae"}
_ALL = "all"
_NONE = "none"


def _residency_problem(text: str) -> str | None:
    component, _, residency = text.partition("=")
    if component and residency in RESIDENCIES:
        return None
    return f"COMPONENT=RESIDENCY, where RESIDENCY is one of {', '.join(RESIDENCIES)}"


@dataclass(frozen=True, kw_only=True)
class MemoryArgs:
    """Where weights are while they are not needed. A component is `resident` on the device; `component-offload`: on the
    host until it runs; `layerwise-offload`: on the host, and its blocks come to the device one after the other."""

    performance_mode: str = arg(
        "auto",
        help="`auto` keeps all weights on the GPU where they fit and moves what must to the host, `speed` keeps all "
        "there, `memory` as few as possible, `manual` does what the other options say and no more.",
        group="memory",
        choices=PERFORMANCE_MODES,
    )
    gpu_memory_limit: float | None = arg(
        None,
        help="Memory of each GPU that may be used, in GiB.",
        group="memory",
        unset="all that is free",
        metavar="GIB",
        minimum=0.1,
        maximum=10_000.0,
    )
    dit_layerwise_offload: bool | None = arg(
        None,
        help="Bring the transformer's blocks to the GPU while those before them compute.",
        group="memory",
        unset="by the performance mode",
    )
    dit_cpu_offload: bool | None = arg(
        None,
        help="Keep the whole transformer on the host while it does not run.",
        group="memory",
        unset="by the performance mode",
    )
    text_encoder_cpu_offload: bool | None = arg(
        None,
        help="Keep text encoders on the host while they do not run.",
        group="memory",
        unset="by the performance mode",
    )
    image_encoder_cpu_offload: bool | None = arg(
        None,
        help="Keep the image encoder on the host while it does not run.",
        group="memory",
        unset="by the performance mode",
    )
    vae_cpu_offload: bool | None = arg(
        None,
        help="Keep the autoencoder on the host while it does not run.",
        group="memory",
        unset="by the performance mode",
    )
    component_residency: tuple[str, ...] | None = arg(
        None,
        help="Where single components are: resident, component-offload or layerwise-offload. COMPONENT is a name in "
        "model_index.json, or dit, text_encoder, image_encoder, vae or all; a name counts before a group.",
        group="memory",
        unset="by the options above",
        metavar="COMPONENT=RESIDENCY",
        check=_residency_problem,
    )
    layerwise_offload_components: tuple[str, ...] | None = arg(
        None,
        help="Components, or groups, whose blocks come one after the other.",
        group="memory",
        unset="by the options above",
        metavar="COMPONENT",
    )
    cpu_offload_components: tuple[str, ...] | None = arg(
        None,
        help="Components, or groups, that are on the host while they do not run; `none` for none at all.",
        group="memory",
        unset="by the options above",
        metavar="COMPONENT",
    )
    dit_offload_prefetch_size: float = arg(
        0.0,
        help="Blocks that are on their way while one computes: from 1 a number, below a part of all blocks; 0 is 2.",
        group="memory",
        minimum=0.0,
        maximum=1000.0,
    )
    dit_layerwise_resident_layers: float | None = arg(
        None,
        help="Blocks of the transformer that stay on the GPU: from 1 a number, below a part of all blocks.",
        group="memory",
        unset="as many as fit",
        minimum=0.0,
        maximum=1000.0,
    )
    dit_layerwise_residency_policy: str = arg(
        "strided",
        help="Which blocks stay: spread evenly, so that transfers never pause, or the first ones.",
        group="memory",
        choices=("strided", "leading"),
    )
    pin_cpu_memory: bool = arg(
        True,
        help="Keep offloaded weights in memory that the GPU reads by itself, which is faster; else, and where the host "
        "has too little, they stay in the checkpoint's files and pass through a small part of such memory.",
        group="memory",
    )

    def asked(self, components: Collection[str]) -> Mapping[str, Residency]:
        """What the options say of these components of a model; nothing of those that the mode decides.

        Raises: InvalidValue for a name that is none of them.
        """
        found: dict[str, Residency] = {}
        flags: tuple[tuple[str, bool | None, Residency], ...] = (
            ("dit", self.dit_cpu_offload, "component-offload"),
            ("dit", self.dit_layerwise_offload, "layerwise-offload"),
            ("text_encoder", self.text_encoder_cpu_offload, "component-offload"),
            ("image_encoder", self.image_encoder_cpu_offload, "component-offload"),
            ("vae", self.vae_cpu_offload, "component-offload"),
        )
        for group, flag, residency in flags:
            if flag is not None:
                chosen: Residency = residency if flag else "resident"
                found |= {name: chosen for name in _members(group, components) if flag or name not in found}
        lists: tuple[tuple[str, Residency], ...] = (
            ("cpu_offload_components", "component-offload"),
            ("layerwise_offload_components", "layerwise-offload"),
        )
        for option, residency in lists:
            named = [name for name in getattr(self, option) or () if name != _NONE]
            found |= dict.fromkeys(_named(option, named, components), residency)
        if self.cpu_offload_components is not None and _NONE in self.cpu_offload_components:
            found |= {name: "resident" for name in components if found.get(name) == "component-offload"}
        pairs = [text.partition("=")[::2] for text in self.component_residency or ()]
        for is_name in (False, True):
            for name, wanted in pairs:
                if (name in components) == is_name:
                    chosen = next(each for each in RESIDENCIES if each == wanted)
                    found |= dict.fromkeys(_named("component_residency", [name], components), chosen)
        return found


ALL_RESIDENT = MemoryArgs()
"""Nothing asked for."""


def _members(group: str, components: Iterable[str]) -> list[str]:
    prefix = _GROUPS[group]
    return [name for name in components if name == prefix or name.startswith(prefix + "_")]


def _named(option: str, names: Iterable[str], components: Collection[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        if name in components:
            found.append(name)
        elif name == _ALL:
            found += components
        elif name in _GROUPS:
            found += _members(name, components)
        else:
            raise InvalidValue(option, name, f"one of {', '.join(dict.fromkeys([*_GROUPS, _ALL, *components]))}")
    return found


def share_of(number: float, whole: int) -> int:
    """From 1 a number, below a part of the whole, rounded up."""
    return min(whole, int(number) if number >= 1 else -int(-(number * whole) // 1))


def as_flags(modes: Mapping[str, Residency]) -> list[str]:
    """Options that would say so."""
    chosen = [f"{name}={residency}" for name, residency in modes.items() if residency != "resident"]
    return [text for each in chosen for text in ("--component-residency", each)]
