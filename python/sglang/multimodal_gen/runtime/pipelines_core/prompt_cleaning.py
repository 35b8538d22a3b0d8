"""How prompts are cleaned before tokenisation; part of a model's training, so equal to the published code."""

from __future__ import annotations

import html
import re

import ftfy

_WHITE_SPACE = re.compile(r"\s+")


def repair_and_collapse(text: str) -> str:
    """Mojibake repaired, HTML entities resolved twice over, white space collapsed."""
    return _WHITE_SPACE.sub(" ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()
