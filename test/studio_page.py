"""Using the Studio as its tests do: what a user does, in words."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from server_process import ServerProcess

# Small and few: the tests are about the page, not about how results look.
SMALL = {"Width": "64", "Height": "64", "Steps": "2"}
SHORT_CLIP = {**SMALL, "Frames": "5"}
RESULT_MS = 60_000


def go(page: Page, server: ServerProcess) -> None:
    """Open it and wait until the form is there."""
    page.goto(f"{server.url}/studio")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=RESULT_MS)


def box(page: Page, name: str) -> Locator:
    return page.get_by_role("textbox", name=name, exact=True)


def fill(page: Page, mode: str, prompt: str, values: dict[str, str]) -> None:
    page.get_by_role("radio", name=mode, exact=True).check()
    for name, value in {"Prompt": prompt, **values}.items():
        box(page, name).fill(value)


def generate(page: Page, mode: str, prompt: str, values: dict[str, str]) -> Locator:
    """Fill the form, press the button, wait for the result; the element that shows it."""
    fill(page, mode, prompt, values)
    page.get_by_role("button", name="Generate").click()
    result = page.locator("#stage .result > *")
    expect(page.locator("#stage .stage-prompt")).to_have_text(prompt)
    expect(result).to_be_visible(timeout=RESULT_MS)
    return result


def facts(page: Page) -> dict[str, str]:
    """What the page tells of the result."""
    return dict(
        zip(page.locator(".facts dt").all_inner_texts(), page.locator(".facts dd").all_inner_texts(), strict=True)
    )


def api(server: ServerProcess, path: str) -> dict[str, Any]:
    reply = httpx.get(f"{server.url}{path}", timeout=30)
    return {"status_code": reply.status_code, **reply.json()}


def picture(width: int, height: int) -> bytes:
    """A PNG, blue with a yellow half."""
    pixels = np.full((height, width, 3), (30, 60, 200), np.uint8)
    pixels[:, width // 2 :] = (240, 200, 40)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


CAT = {"name": "cat.png", "mimeType": "image/png", "buffer": picture(96, 64)}


def attach(page: Page) -> None:
    page.get_by_role("radio", name="Image", exact=True).check()
    page.locator("[data-input=image] input[type=file]").set_input_files(CAT)  # type: ignore[arg-type]
    expect(page.locator(".file")).to_contain_text("cat.png")


def stroke(page: Page, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw over the picture; places in shares of its sides."""
    canvas = page.get_by_role("application", name="Mask")
    canvas.hover()  # waits until it lies still and nothing is in front of it: strokes beside it would paint nothing
    frame = canvas.bounding_box()
    assert frame is not None
    for index, (x, y) in enumerate((begin, end)):
        page.mouse.move(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"], steps=4)
        if index == 0:
            page.mouse.down()
    page.mouse.up()


def everything_open(page: Page) -> Iterator[str]:
    """Brings the page into each of its states, which it names."""
    yield "empty"
    page.locator("#advanced > summary").click()
    page.get_by_text("Negative prompt", exact=True).first.click()
    generate(page, "Image", "a purple triangle with a long name that goes on and on", SMALL | {"Number of images": "2"})
    attach(page)
    yield "a result"
    page.get_by_role("button", name="Draw mask").click()
    yield from _until_escape(page, "mask")
    page.get_by_role("button", name="Show as code").click()
    yield from _until_escape(page, "code")
    for index in (0, 1):
        page.locator(".card .pick").nth(index).click()
    yield "two chosen"
    page.locator("#compare-go").click()
    expect(page.locator("#compare-dialog img")).to_have_count(2)
    yield from _until_escape(page, "compare")
    page.get_by_role("button", name="API key").click()
    yield from _until_escape(page, "key")
    page.locator("#stage").get_by_role("button", name="Delete").click()
    yield from _until_escape(page, "confirm")
    box(page, "Steps").fill("0")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_text("accepted is an integer").first).to_be_visible()
    yield "error"


def _until_escape(page: Page, name: str) -> Iterator[str]:
    """A dialog from when it is there to when it has gone: a key that comes too early closes nothing."""
    dialog = page.locator(f"#{name}-dialog")
    expect(dialog).to_be_visible()
    yield name
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
