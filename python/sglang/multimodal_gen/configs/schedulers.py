"""The short names of samplers, as options and requests give them; runtime/models/schedulers has what they mean."""

from __future__ import annotations

SCHEDULER_NAMES = (
    "euler",
    "euler_karras",
    "euler_exponential",
    "euler_beta",
    "unipc",
    "flow_unipc",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "lcm",
)
