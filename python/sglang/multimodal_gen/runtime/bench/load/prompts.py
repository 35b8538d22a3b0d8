"""Prompts of a load test that brings none: long and short ones, of things that move and things that do not."""

from __future__ import annotations

PROMPTS = (
    "a red circle moving right",
    "a lighthouse at dusk, waves breaking over the rocks below it",
    "a green bicycle leaning against a whitewashed wall, long afternoon shadows",
    "an old fisherman mending a net on a pier, close-up of his hands, overcast light, shallow depth of field",
    "steam rising from a bowl of noodle soup on a wooden counter",
    "a paper boat on a rain-filled gutter",
    "aerial view of a river delta in autumn, ochre and deep blue, fine branching channels down to the sea",
    "a tabby cat asleep on a stack of newspapers",
    "a night train crossing a viaduct, its lit windows reflected in the lake beneath, seen from far away",
    "a glass marble rolling down a spiral staircase",
    "portrait of a woman in a yellow raincoat, looking past the camera, city lights blurred behind her",
    "three clay pots on a windowsill, one of them cracked",
    "a snowy owl taking off from a fence post, slow motion, powder snow falling from its wings",
    "the inside of a mechanical watch, brass gears turning",
    "a market stall with pyramids of oranges and lemons under a striped awning, early morning, people setting up",
    "a blue square moving down",
)
