"""What the Studio makes of the server's states and streams, and of its users' eyes, hands and screens."""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any

import httpx
from playwright.sync_api import BrowserContext, Page, Route, expect

from server_process import ServerProcess
from studio_page import SHORT_CLIP, SMALL, api, box, everything_open, fill, generate, go, picture

PHONE = {"width": 360, "height": 740}
# What must say what it is, to those who do not see it.
NAMED_ROLES = {
    "button", "checkbox", "combobox", "dialog", "form", "image", "link", "listbox", "option", "progressbar",
    "radio", "region", "slider", "spinbutton", "switch", "tab", "tabpanel", "textbox", "toolbar", "application",
}  # fmt: skip

# --- the server's state ---


def test_the_key_is_asked_for_and_sent_with_everything(page: Page, server: ServerProcess) -> None:
    """The server's refusal is played here: this server has no key."""
    refused: list[str] = []

    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right-key":
            route.continue_()
            return
        refused.append(route.request.url)
        error = {
            "message": "a key is needed",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
        route.fulfill(status=401, json={"error": error})

    page.route(re.compile(r"/(v1/|openapi\.json)"), guard)
    page.goto(f"{server.url}/studio")
    dialog = page.get_by_role("dialog", name="API key")
    for key, sentence in (("wrong-key", "asks for a key"), ("right-key", "did not accept")):
        expect(dialog).to_contain_text(sentence)
        dialog.get_by_role("textbox", name="Key").fill(key)
        page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    assert refused and page.evaluate("Object.values(sessionStorage)").count("right-key") == 1
    assert page.evaluate("Object.values(localStorage)") == []
    refused.clear()
    generate(page, "Video", "a star", SHORT_CLIP)
    assert refused == [], "media and events carry the key as well"
    page.locator("#advanced > summary").click()
    expect(page.get_by_role("switch", name="Profile", exact=True)).to_be_visible()  # for administrators


def test_a_model_that_still_loads_is_waited_for(context: BrowserContext, server: ServerProcess) -> None:
    page = context.new_page()
    page.route(
        "**/health", lambda route: route.fulfill(status=503, json={"status": "unavailable", "state": "starting"})
    )
    page.goto(f"{server.url}/studio")
    expect(page.locator("#banner")).to_contain_text("The model is loading")
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    page.unroute("**/health")
    page.route("**/health", lambda route: route.abort())
    expect(page.locator("#banner")).to_contain_text("cannot be reached")
    page.unroute("**/health")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    expect(page.locator("#banner")).to_be_hidden()


def test_a_parameter_that_nobody_foresaw_appears_and_is_sent(page: Page, server: ServerProcess) -> None:
    document = httpx.get(f"{server.url}/openapi.json", timeout=30).json()
    content = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]
    content["application/json"]["schema"]["properties"] |= {
        "sharpness_cfg": {
            "description": "How sharp.",
            "type": "number",
            "minimum": 0,
            "maximum": 2,
            "x-group": "finish",
        },
        "finish": {
            "description": "Surface.",
            "anyOf": [{"type": "string", "enum": ["matt", "gloss"]}, {"type": "null"}],
        },
        "tiled": {"description": "Repeats.", "anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "weights": {"description": "By name.", "anyOf": [{"type": "object"}, {"type": "null"}]},
    }
    page.route("**/openapi.json", lambda route: route.fulfill(json=document))
    go(page, server)
    fill(page, "Image", "a star", SMALL)
    page.locator("#advanced > summary").click()
    box(page, "Sharpness CFG").fill("1.5")
    expect(page.get_by_role("slider", name="Sharpness CFG, slider")).to_have_value("1.5")
    page.get_by_role("combobox", name="Finish").select_option("gloss")
    page.get_by_role("combobox", name="Tiled").select_option("false")
    box(page, "Weights").fill('{"a": 0.5}')
    expect(page.get_by_role("heading", name="Finish")).to_be_visible()
    with page.expect_request("**/v1/images/generations") as sent:
        page.keyboard.press("Control+Enter")
    body = sent.value.post_data_json
    assert body is not None
    found = {name: body[name] for name in ("sharpness_cfg", "finish", "tiled", "weights")}
    assert found == {"sharpness_cfg": 1.5, "finish": "gloss", "tiled": False, "weights": {"a": 0.5}}
    assert "guidance_scale" not in body, "what nobody set is left to the server"


# --- live ---


def event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


def a_png() -> str:
    return base64.b64encode(picture(16, 16)).decode()


def test_events_of_a_video_bring_previews_and_steps(page: Page, server: ServerProcess) -> None:
    """The events are played, in the server's form, after the real video is done; its content is the real one."""
    asked: list[str] = []

    def play(route: Route) -> None:
        video_id = route.request.url.split("/")[-2]
        asked.append(video_id)
        while (video := api(server, f"/v1/videos/{video_id}"))["status"] in ("queued", "in_progress"):
            time.sleep(0.1)
        running = video | {"status": "in_progress", "progress": 40, "eta_seconds": 75.0}
        preview = {"video_id": video_id, "step": 3, "total_steps": 7, "media_type": "image/png", "b64_json": a_png()}
        route.fulfill(
            content_type="text/event-stream",
            body=": keep-alive\n\n" + event("video.in_progress", sequence_number=0, video=running)
            + event("video.preview", sequence_number=1, **preview)
            + (event("video.completed", sequence_number=2, video=video) if len(asked) > 1 else ""),
        )  # fmt: skip

    page.route(re.compile(r"/v1/videos/[^/]+/events$"), play)
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => {
            const image = document.querySelector("#stage .preview > img");
            const text = document.querySelector("#stage .progress-text")?.textContent;
            if (image && text) window.seen.push([image.src.slice(0, 5), text]);
        }).observe(document.getElementById("stage"), {subtree: true, childList: true, characterData: true});
    }""")
    # A stream that breaks off is gone on from by asking.
    for count in (1, 2):
        generate(page, "Video", f"a star {count}", SHORT_CLIP)
        assert len(asked) == count
    assert ["blob:", "Step 3 of 7 · 40 % · about 1 min 15 s left"] in page.evaluate("window.seen")


def test_partial_images_are_shown_while_an_image_is_made(page: Page, server: ServerProcess) -> None:
    shared = {"size": "16x16", "quality": "auto", "background": "opaque", "output_format": "png", "created_at": 1}
    error = json.dumps({"error": {"message": "out of memory", "type": "server_error", "param": None, "code": "oom"}})
    bodies = [
        event("image_generation.partial_image", b64_json=a_png(), partial_image_index=1, **shared)
        + event("image_generation.completed", b64_json=a_png(), usage=None, **shared),
        event("image_generation.partial_image", b64_json=a_png(), partial_image_index=0, **shared)
        + f"data: {error}\n\n",
    ]
    sent = []

    def play(route: Route) -> None:
        sent.append(route.request.post_data_json)
        route.fulfill(content_type="text/event-stream; charset=utf-8", body=bodies[len(sent) - 1])

    page.route("**/v1/images/generations", play)
    result = generate(page, "Image", "a star", SMALL)
    assert result.evaluate("(image) => image.naturalWidth") == 16
    assert (sent[0]["stream"], sent[0]["partial_images"]) == (True, 3)
    box(page, "Prompt").fill("a comet")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#stage").get_by_text("out of memory")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_text("out of memory")


def test_an_image_that_waits_says_how_many_are_before_it(page: Page) -> None:
    states = [
        {"status": "queued", "queue_position": 2, "eta_seconds": 9.0},
        {"status": "in_progress", "progress": 25, "step": 1, "total_steps": 3, "eta_seconds": 6.0},
    ]
    done = event("image_generation.completed", b64_json=a_png(), output_format="png")
    body = ": keep-alive\n\n" + "".join(f": {json.dumps(state)}\n\n" for state in states) + done
    page.route("**/v1/images/generations", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.evaluate("""() => {
        window.seen = [];
        const told = (record) => record.target.matches?.(".progress-text") ? [...record.addedNodes] : [];
        new MutationObserver((records) => window.seen.push(...records.flatMap(told).map((node) => node.data)))
            .observe(document.getElementById("stage"), {subtree: true, childList: true});
    }""")
    generate(page, "Image", "a star", SMALL)
    seen = page.evaluate("window.seen")
    expected = ["Waiting for its turn… 2 before it", "Step 1 of 3 · 25 % · about 6.0 s left"]
    assert [text for text in seen if text in expected] == expected, seen


def test_a_server_without_streams_and_events_is_asked_plainly(page: Page) -> None:
    def refuse_stream(route: Route) -> None:
        if '"stream": true' in (route.request.post_data or ""):
            error = {"message": "stream: no", "type": "invalid_request_error", "param": "stream", "code": "unsupported"}
            route.fulfill(status=400, json={"error": error})
        else:
            route.continue_()

    page.route("**/v1/images/generations", refuse_stream)
    page.route(re.compile(r"/v1/videos/[^/]+/events$"), lambda route: route.fulfill(status=404, json={"error": {}}))
    generate(page, "Image", "a star", SMALL)
    generate(page, "Video", "a circle", SHORT_CLIP)


# --- for everybody ---


def without_a_name(page: Page, context: BrowserContext) -> list[str]:
    """What the browser would tell a screen reader without a name, as its role and the node's id."""
    tree = context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    return [
        f"{node['role']['value']} {node.get('backendDOMNodeId')}"
        for node in tree
        if not node["ignored"]
        and node["role"]["value"] in NAMED_ROLES
        and not node.get("name", {}).get("value", "").strip()
    ]


# Text that is too faint, by WCAG 2: 4.5 to 1, 3 to 1 for large text. What is behind it is the nearest parent's opaque
# background.
FAINT = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = (color) => color.slice(0, 3).map((v) => linear(v / 255))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const color = rgba(getComputedStyle(e).backgroundColor);
            if (color[3] > 250) return color;
        }
        return rgba("white");
    };
    const faint = new Set();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const style = getComputedStyle(element);
        const text = walker.currentNode.textContent.trim();
        if (!text || !element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
        if (element.closest(":disabled, .badge, kbd, dialog:not([open]), script, noscript")) continue;
        const [a, b] = [light(rgba(style.color)), light(behind(element))].sort((x, y) => y - x);
        const large = parseFloat(style.fontSize) >= (style.fontWeight >= 700 ? 18.66 : 24);
        if ((a + 0.05) / (b + 0.05) < (large ? 3 : 4.5)) faint.add(`${element.className}: ${text}`);
    }
    return [...faint];
}"""


def test_everything_has_a_name_enough_contrast_and_an_id_of_its_own(page: Page, context: BrowserContext) -> None:
    for state in everything_open(page):
        assert without_a_name(page, context) == [], state
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            assert page.evaluate(FAINT) == [], f"{state}, {scheme}"
        ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map((element) => element.id)")
        assert len(ids) == len(set(ids)), state
        dangling = page.evaluate("""() => ["aria-describedby", "aria-labelledby", "aria-controls", "for"]
            .flatMap((name) => [...document.querySelectorAll(`[${name}]`)].map((element) => element.getAttribute(name)))
            .flatMap((ids) => ids.split(" ")).filter((id) => !document.getElementById(id))""")
        assert set(dangling) <= {"mask-title", "code-title", "compare-title"}, f"{state}: of dialogs that are closed"


def test_on_a_phone_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    for state in everything_open(page):
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], state
        wide = page.evaluate("""() => [...document.querySelectorAll("body *")].filter((e) => {
            const box = e.getBoundingClientRect();
            const cut = e.closest(".visually-hidden, .skip, .strip, .code, .skeleton, svg, .bar, .form-error");
            return box.width > 0 && !cut && (box.right > innerWidth + 0.5 || box.left < -0.5);
        }).map((e) => e.className || e.tagName)""")
        assert wide == [], state
        small = page.evaluate("""() => [...document.querySelectorAll("button, summary")]
            .filter((e) => e.checkVisibility() && Math.min(e.offsetWidth, e.offsetHeight) < 24)
            .map((e) => e.ariaLabel ?? e.textContent)""")
        assert small == [], f"{state}: too small for a finger"


def brightness(page: Page) -> float:
    return float(page.evaluate("""() => {
        const canvas = new OffscreenCanvas(1, 1).getContext("2d");
        canvas.fillStyle = getComputedStyle(document.body).backgroundColor;
        canvas.fillRect(0, 0, 1, 1);
        return canvas.getImageData(0, 0, 1, 1).data[1];
    }"""))  # fmt: skip


def test_the_theme_follows_the_system_until_it_is_switched(page: Page, server: ServerProcess) -> None:
    for scheme, is_dark in (("dark", True), ("light", False)):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert (brightness(page) < 128) is is_dark
    page.get_by_role("button", name="Switch to the dark theme").click()
    assert brightness(page) < 128
    go(page, server)
    assert brightness(page) < 128, "it is remembered"
    page.get_by_role("button", name="Switch to the light theme").click()
    assert brightness(page) > 128


def test_the_dice_draws_seeds_and_fields_go_back_to_their_default(page: Page) -> None:
    seed = box(page, "Seed")
    drawn = set()
    for _ in range(3):
        page.get_by_role("button", name="Draw a seed").click()
        drawn.add(int(seed.input_value()))
    assert len(drawn) == 3 and all(0 <= each < 2**32 for each in drawn)
    page.get_by_role("button", name="Reset Seed to the default").click()
    expect(seed).to_have_value("")
    page.get_by_role("button", name="Aspect ratio 16:9").click()
    expect(box(page, "Width")).to_have_value("176")
    expect(box(page, "Height")).to_have_value("96")
    page.get_by_role("button", name="Swap width and height").click()
    expect(page.get_by_role("button", name="Aspect ratio 9:16")).to_have_attribute("aria-pressed", "true")
