"""Captions of drawn clips: many ways to say what is seen, and to leave part of it unsaid."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from demo_model.held_out import is_held_out_caption
from demo_model.vocabulary import ClipFacts, ObjectFacts

# Owners of words that speak of no object.
NOBODY, BACKGROUND = -1, -2
_Words = list[tuple[str, int]]
"""Words with their owners."""

# How often an attribute is said; unsaid, it is whatever the clip happens to show.
SAY_SIZE, SAY_POSITION, SAY_MOTION, SAY_BACKGROUND = 0.35, 0.35, 0.85, 0.5
EMPTY_SHARE = 0.1  # classifier-free guidance needs the unconditional model

_SIZES = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "medium sized"),
    "large": ("large", "large", "big", "huge"),
}
_SHAPES = {
    "circle": ("circle",) * 8 + ("disc", "ball", "round circle"),
    "square": ("square",) * 10 + ("box",),
    "triangle": ("triangle",),
    "star": ("star",) * 10 + ("five-pointed star",),
}
_COLOURS = {"purple": ("purple",) * 5 + ("violet",), "cyan": ("cyan",) * 5 + ("turquoise",)}
_POSITIONS = {
    "top left": ("in the top left corner", "at the top left", "in the upper left", "in the top left"),
    "top": ("at the top", "at the top", "near the top", "in the upper part"),
    "top right": ("in the top right corner", "at the top right", "in the upper right", "in the top right"),
    "left": ("on the left", "on the left", "on the left side", "at the left"),
    "center": ("in the center", "in the middle", "at the center"),
    "right": ("on the right", "on the right", "on the right side", "at the right"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left", "in the bottom left"),
    "bottom": ("at the bottom", "at the bottom", "near the bottom", "in the lower part"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right", "in the bottom right"),
}
_VERBS = (
    *("moving", "moving", "moving", "moves", "that moves", "is moving", "which is moving", "drifting", "drifts"),
    *("sliding", "slides", "gliding", "glides", "going", "goes", "travelling", "floating", "flying"),
)
_WAYS = {
    "left": ("left", "left", "to the left", "leftward", "leftwards", "from right to left", "towards the left"),
    "right": ("right", "right", "to the right", "rightward", "rightwards", "from left to right", "towards the right"),
    "up": ("up", "up", "upward", "upwards", "from bottom to top", "towards the top"),
    "down": ("down", "down", "downward", "downwards", "from top to bottom", "towards the bottom"),
}
_CHANGES = {
    "growing": ("growing", "growing", "grows", "that grows", "is growing", "getting bigger", "growing larger"),
    "shrinking": ("shrinking", "shrinking", "shrinks", "that shrinks", "is shrinking", "getting smaller"),
    "spinning": ("spinning", "spinning", "spins", "that spins", "is spinning", "rotating", "rotates", "turning around"),
    "still": ("still", "standing still", "staying still", "that stays still", "not moving", "at rest", "motionless"),
}
_BACKGROUNDS = (*("on a {0} background",) * 2, "on {0}", "over a {0} background", "in front of a {0} background")
_LIGHT = ("blue", "green", "yellow", "pink", "purple")  # backgrounds that may be called light
_OPENINGS = {
    True: ("a video of", "a clip of", "an animation of", "video:", "a short film showing"),
    False: ("a picture of", "an image of", "a drawing of", "image:", "a photo of"),
}
_FILLERS = ("bright", "simple", "cute", "nice", "happy", "flat", "colourful", "beautiful")
# Words that change nothing: a caption with some of them still shows what the rest of it says.
_PLAIN_TEXT = """
about after again all also always and another any around as away back because before being best better between both
calm can city clean clear cloud cool day deep dream during each early earth easy energy even every evening far fast
few film fine first for forest friend from full fun garden gentle giant glow good grand great hand happy hard here
high hill home house how icon idea into jump just keep kind lake last late let life like line live logo long look
lovely magic make many minimal modern moment moon more morning mountain much music my neat never new next night now
ocean of old one only open or our out paper park part peace people perfect place play please power pretty quick quiet
rain real river road rough run sea see shiny show side silent sky sleep slow smile smooth snow soft some song sound
space spring stay step stone story street style summer sun sweet take tall than that the then there thing this time
today together tree true under very view walk wall warm water wave way we well what when while wide wild wind window
winter with wonder wood word work world year you young high quality 4k hd cinematic detailed aesthetic professional
animated drawn vector geometry graphic
"""
PLAIN_WORDS = tuple(_PLAIN_TEXT.split())


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption with what it says: `told` has None for what is left unsaid."""

    text: str
    told: ClipFacts
    owners: tuple[int, ...]
    """Whom each word speaks of: index of the object in `told`, BACKGROUND or NOBODY. Spaces separate words."""


def describe(facts: ClipFacts, rng: random.Random) -> Caption:
    """A random caption that is true of the clip, never a held-out one, sometimes empty."""
    if rng.random() < EMPTY_SHARE:
        return Caption(text="", told=ClipFacts(objects=()), owners=())
    while True:
        words, told = _sentence(facts, rng)
        text = _polish(" ".join(word for word, _ in words), rng)
        if not is_held_out_caption(text):
            return Caption(text=text, told=told, owners=tuple(owner for _, owner in words))


def _sentence(facts: ClipFacts, rng: random.Random) -> tuple[_Words, ClipFacts]:
    video = any(item.motion for item in facts.objects)
    article = rng.choices(("a", "the", "", "one"), (70, 10, 17, 3))[0]
    joint = rng.choices(("and", ",", "with", "next to"), (85, 9, 3, 3))[0]
    told_motion = rng.random() < SAY_MOTION
    words: _Words = []
    told = list(facts.objects)
    # Either object may be named first.
    for index in rng.sample(range(len(told)), len(told)):
        if words:
            words = _with_comma(words) if joint == "," else words + _owned(joint, NOBODY)
        phrase, told[index] = _phrase(facts.objects[index], article, told_motion, rng)
        words += _owned(phrase, index)
    if rng.random() < 0.08:
        words = _owned(rng.choice(_OPENINGS[video]), NOBODY) + words
    background = facts.background if rng.random() < SAY_BACKGROUND else None
    if background is not None:
        words = _with_background(words, background, rng)
    if rng.random() < 0.08:
        words = _with_plain_words(words, rng)
    return words, ClipFacts(objects=tuple(told), background=background)


def _owned(phrase: str, owner: int) -> _Words:
    return [(word, owner) for word in phrase.split()]


def _with_comma(words: _Words) -> _Words:
    *before, (last, owner) = words
    return [*before, (f"{last},", owner)]


def _phrase(item: ObjectFacts, article: str, told_motion: bool, rng: random.Random) -> tuple[str, ObjectFacts]:
    """One object, and what is said of it: article, size, colour, shape, then motion and place in either order."""
    told = dataclasses.replace(item, size=None, position=None, motion=item.motion if told_motion else None)
    noun = f"{rng.choice(_COLOURS.get(item.colour, (item.colour,)))} {rng.choice(_SHAPES[item.shape])}"
    if item.size is not None and rng.random() < (SAY_SIZE if item.size != "medium" else SAY_SIZE / 4):
        noun = f"{rng.choice(_SIZES[item.size])} {noun}"
        told = dataclasses.replace(told, size=item.size)
    if rng.random() < 0.05:
        noun = f"{rng.choice(_FILLERS)} {noun}"
    if article == "a" and noun[0] in "aeiou":
        article = "an"
    parts = []
    if told.motion is not None:
        parts.append(_motion(told.motion, rng))
    if item.position is not None and rng.random() < SAY_POSITION:
        told = dataclasses.replace(told, position=item.position)
        parts.insert(rng.choice((0, len(parts))), rng.choice(_POSITIONS[item.position]))
    return " ".join(word for word in (article, noun, *parts) if word), told


def _motion(motion: str, rng: random.Random) -> str:
    if motion in _WAYS:
        return f"{rng.choice(_VERBS)} {rng.choice(_WAYS[motion])}"
    return rng.choice(_CHANGES[motion])


def _with_background(words: _Words, background: str, rng: random.Random) -> _Words:
    colour = f"light {background}" if background in _LIGHT and rng.random() < 0.2 else background
    phrase = _owned(rng.choice(_BACKGROUNDS).format(colour), BACKGROUND)
    order = rng.random()
    if order < 0.75:
        return words + phrase
    if order < 0.9:
        return _with_comma(phrase) + words
    return _with_comma(words) + _owned(f"{colour} background", BACKGROUND)


def _with_plain_words(words: _Words, rng: random.Random) -> _Words:
    """Put one to four unrelated words before, after or between the others."""
    extra = [(word, NOBODY) for word in rng.choices(PLAIN_WORDS, k=rng.randint(1, 4))]
    place = rng.choice((0, len(words), rng.randint(0, len(words))))
    return [*words[:place], *extra, *words[place:]]


def _polish(caption: str, rng: random.Random) -> str:
    case = rng.random()
    if case < 0.15:
        caption = caption[:1].upper() + caption[1:]
    elif case < 0.18:
        caption = caption.upper()
    return caption + "." if rng.random() < 0.15 else caption
