"""The Studio in a real browser, Chromium without a window, against a real server of the embedded model."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, Route, expect

from server_process import ServerProcess
from studio_page import RESULT_MS, SHORT_CLIP, SMALL, api, attach, box, facts, fill, generate, go, picture, stroke

# --- generating ---


def test_an_image_is_generated_with_the_keyboard_alone(page: Page) -> None:
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate("() => [document.activeElement.id, document.activeElement.name].join(' ').trim()")
        outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        parent = page.evaluate(
            "() => getComputedStyle(document.activeElement.nextElementSibling ?? document.body).outlineStyle"
        )
        assert "solid" in (outline, parent), f"the focus is not to be seen at {focused}"
        seen.append(focused)
        if "mode" in focused:
            page.keyboard.press("ArrowLeft")
            expect(page.get_by_role("radio", name="Image", exact=True)).to_be_checked()
        for name, text in (
            ("prompt", "a blue square"),
            ("width", "64"),
            ("height", "64"),
            ("num_inference_steps", "2"),
        ):
            if focused == f"field-{name} {name}":
                page.keyboard.type(text)
        if focused.endswith(" num_inference_steps"):
            break
    assert {"key", "theme", "mode", "field-prompt prompt"} <= set(seen)
    page.keyboard.press("ArrowUp")
    expect(box(page, "Steps")).to_have_value("3")
    page.keyboard.press("Control+Enter")
    picture = page.get_by_role("region", name="Result").get_by_role("img", name="a blue square")
    expect(picture).to_be_visible(timeout=RESULT_MS)
    assert picture.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [64, 64]
    assert facts(page)["Size"] == "64 × 64"


def test_a_video_is_generated_and_its_progress_shown(page: Page, server: ServerProcess) -> None:
    fill(page, "Video", "a red circle moving right", {**SHORT_CLIP, "Frames": "33", "Steps": "12"})
    expect(page.get_by_text("2 s at 16 frames a second")).to_be_visible()
    page.get_by_role("button", name="Generate").click()
    bar = page.locator("#stage").get_by_role("progressbar", name="Progress of the video")
    expect(bar).to_have_attribute("aria-valuenow", re.compile(r"[1-9]\d?"), timeout=RESULT_MS)
    told = bar.get_attribute("aria-valuetext") or ""
    assert re.fullmatch(r"Step \d+ of 12 · \d+ % · (about .+ left|\d+ s so far)", told), told
    assert page.title().endswith("– Studio") and "Step" in page.title()
    video = page.locator("#stage video")
    expect(video).to_be_visible(timeout=RESULT_MS)
    video.evaluate("(video) => new Promise((done) => video.readyState > 0 ? done() : (video.onloadedmetadata = done))")
    assert video.evaluate("(video) => [video.videoWidth, Math.round(video.duration)]") == [64, 2]
    card = page.locator(".card").first
    expect(card.locator(".thumb img")).to_be_visible()
    expect(card).to_contain_text("a red circle moving right")
    listed = api(server, f"/v1/videos/{card.get_attribute('data-key')}")
    assert (listed["status"], str(listed["seed"])) == ("completed", facts(page)["Seed"])
    with page.expect_download() as download:
        page.locator("#stage").get_by_role("button", name="Download").click()
    assert re.fullmatch(r"a-red-circle-moving-right-\d+\.mp4", download.value.suggested_filename)


def test_a_video_of_many_steps_is_seen_on_its_way(page: Page, tmp_path: Path) -> None:
    """The preview is a small animation, which the browser shows in the place of the result."""
    fill(page, "Video", "a red circle", {"Width": "128", "Height": "128", "Frames": "9", "Steps": "40"})
    page.get_by_role("button", name="Generate").click()
    preview = page.locator("#stage .preview img")
    expect(preview).to_be_visible(timeout=RESULT_MS)
    sides = preview.evaluate("async (image) => (await image.decode(), [image.naturalWidth, image.naturalHeight])")
    assert sides == [128, 128]
    page.screenshot(path=tmp_path / "preview.png")
    expect(page.locator("#stage video")).to_be_visible(timeout=RESULT_MS)
    expect(preview).to_have_count(0)


def test_the_progress_of_an_image_is_the_servers(page: Page, tmp_path: Path) -> None:
    fill(page, "Image", "a star", {"Width": "128", "Height": "128", "Steps": "80"})
    page.get_by_role("button", name="Generate").click()
    bar = page.locator("#stage").get_by_role("progressbar", name="Progress of the image")
    expect(bar).to_have_attribute(
        "aria-valuetext", re.compile(r"Step [1-9]\d* of 80 · \d+ % · about .+ left"), timeout=RESULT_MS
    )
    step, percent = map(int, re.findall(r"Step (\d+) of 80 · (\d+) %", bar.get_attribute("aria-valuetext") or "")[0])
    assert abs(percent - 100 * step / 80) < 10, "of the whole work, of which steps are the most"
    expect(page.locator("#stage .preview img")).to_be_visible(timeout=RESULT_MS)
    page.screenshot(path=tmp_path / "progress.png")
    expect(page.locator("#stage .result img")).to_be_visible(timeout=RESULT_MS)


def test_each_of_several_images_has_a_stream_and_a_seed_of_its_own(page: Page) -> None:
    sent: list[dict[str, Any]] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/v1/images/generations") else None)
    generate(page, "Image", "a star", {**SMALL, "Number of images": "4", "Seed": "7"})
    assert sorted((each["seed"], each["n"], each["stream"]) for each in sent) == [(7 + i, 1, True) for i in range(4)]
    strip = page.get_by_role("group", name="Images of this job").get_by_role("button")
    expect(strip).to_have_count(4)
    for index in range(4):
        strip.nth(index).click()
        expect(page.locator(".facts")).to_contain_text(f"{7 + index}")


def test_escape_cancels_a_video_on_the_server_too(page: Page, server: ServerProcess) -> None:
    fill(page, "Video", "a star", {**SHORT_CLIP, "Steps": "1000"})
    with page.expect_response(lambda reply: reply.request.method == "POST") as created:
        page.keyboard.press("Control+Enter")
    video_id = created.value.json()["id"]
    expect(page.locator("#stage").get_by_role("progressbar")).to_be_visible()
    expect(page.locator(".card.running")).to_have_count(1)
    with page.expect_response(lambda reply: reply.request.method == "DELETE") as deleted:
        page.keyboard.press("Escape")
    assert deleted.value.status == 200
    expect(page.locator("#stage").get_by_role("heading", name="Cancelled")).to_be_visible()
    expect(page.locator(".card.running")).to_have_count(0)
    assert api(server, f"/v1/videos/{video_id}")["status_code"] == 404


def test_an_image_can_be_cancelled_with_its_button(page: Page) -> None:
    fill(page, "Image", "a star", {**SMALL, "Steps": "1000"})
    page.get_by_role("button", name="Generate").click()
    page.locator("#stage").get_by_role("button", name="Cancel").click()
    expect(page.locator("#stage").get_by_role("heading", name="Cancelled")).to_be_visible()
    # The next one is not held up by it.
    generate(page, "Image", "a circle", SMALL)


# --- errors ---


def test_an_error_is_shown_at_its_field_until_that_changes(page: Page) -> None:
    fill(page, "Image", "a star", {**SMALL, "Steps": "0"})
    page.keyboard.press("Control+Enter")
    steps = box(page, "Steps")
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(steps).to_be_focused()
    sentence = "num_inference_steps: got 0, accepted is an integer from 1 to 1000"
    expect(steps).to_have_accessible_description(re.compile(re.escape(sentence)))
    expect(page.get_by_role("alert")).to_have_text(sentence)
    expect(page.get_by_text("Nothing made yet")).to_be_visible()
    steps.fill("2")
    expect(steps).not_to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_errors_find_the_field_that_they_are_about(page: Page) -> None:
    for mode, values, field in (
        ("Image", {"Width": "65", "Height": "64"}, "Width"),
        ("Video", {"Width": "64", "Frames": "6"}, "Frames"),
        ("Image", {"Seed": "no number"}, "Seed"),
        ("Image", {"Seed": "1", "Prompt": " "}, "Prompt"),
    ):
        fill(page, mode, "a star", values)
        page.keyboard.press("Control+Enter")
        expect(box(page, field)).to_have_attribute("aria-invalid", "true")
        expect(page.locator("[aria-invalid]")).to_have_count(1)


def test_an_error_of_an_advanced_field_opens_its_part_of_the_form(page: Page) -> None:
    page.locator("#advanced > summary").click()
    fill(page, "Image", "a star", {"CFG interval start": "0.8", "CFG interval end": "0.2"})
    page.locator("#advanced > summary").click()
    expect(box(page, "CFG interval start")).to_be_hidden()
    page.keyboard.press("Control+Enter")
    expect(box(page, "CFG interval start")).to_have_attribute("aria-invalid", "true")
    expect(box(page, "CFG interval start")).to_be_visible()


# --- images and masks ---


def mask_of(page: Page) -> np.ndarray:
    """True where the mask that an edit sends is transparent, [H, W]."""
    page.evaluate("""() => {
        const append = FormData.prototype.append;
        window.sent = {};
        FormData.prototype.append = function (name, value, ...rest) {
            window.sent[name] = value;
            append.call(this, name, value, ...rest);
        };
    }""")
    expect(page.locator("#mask-dialog")).to_be_hidden()
    expect(page.get_by_role("button", name="Edit mask")).to_be_focused()  # then the page has taken the mask
    with page.expect_request(lambda request: request.url.endswith("/v1/images/edits")):
        page.keyboard.press("Control+Enter")
    with sent_picture(page, "image") as image, sent_picture(page, "mask") as mask:
        assert image.size == (96, 64)
        assert (mask.format, mask.mode, mask.size) == ("PNG", "RGBA", (96, 64))
        alpha = np.asarray(mask)[..., 3]
    assert set(np.unique(alpha)) <= {0, 255}
    return alpha == 0


def sent_picture(page: Page, name: str) -> Image.Image:
    """A file of the form that was sent last: the browser's protocol shows nothing of files."""
    script = "async (name) => btoa(String.fromCharCode(...new Uint8Array(await window.sent[name].arrayBuffer())))"
    return Image.open(io.BytesIO(base64.b64decode(page.evaluate(script, name))))


def test_an_uploaded_image_and_a_drawn_mask_make_an_edit(page: Page) -> None:
    fill(page, "Image", "a green star", SMALL)
    expect(box(page, "Change")).to_be_hidden()  # says something about an image that is not there
    attach(page)
    box(page, "Change").fill("0.9")
    page.get_by_role("button", name="Draw mask").click()
    stroke(page, (0.25, 0.5), (0.75, 0.5))
    page.keyboard.press("e")
    stroke(page, (0.5, 0.2), (0.5, 0.8))
    page.get_by_role("button", name="Use mask").click()
    expect(page.get_by_role("button", name="Edit mask")).to_be_focused()
    made_anew = mask_of(page)
    assert made_anew[32, 26] and made_anew[32, 70], "painted"
    assert not made_anew[32, 48] and not made_anew[4, 4], "erased, and never painted"
    expect(page.locator("#stage .result img")).to_be_visible(timeout=RESULT_MS)


def test_a_mask_is_undone_redone_inverted_cleared_and_drawn_with_keys(page: Page) -> None:
    fill(page, "Image", "a green star", SMALL)
    attach(page)
    page.get_by_role("button", name="Draw mask").click()
    stroke(page, (0.1, 0.1), (0.2, 0.1))
    stroke(page, (0.8, 0.9), (0.9, 0.9))
    page.keyboard.press("Control+z")
    page.get_by_role("button", name="Redo").click()
    page.keyboard.press("Control+z")
    page.get_by_role("button", name="Use mask").click()
    made_anew = mask_of(page)
    assert made_anew[6, 12] and not made_anew[57, 80]
    expect(page.locator("#stage .result img")).to_be_visible(timeout=RESULT_MS)

    page.get_by_role("button", name="Edit mask").click()
    page.get_by_role("button", name="Invert").click()
    page.get_by_role("button", name="Use mask").click()
    assert np.array_equal(mask_of(page), ~made_anew), "it goes on from the mask before"

    page.get_by_role("button", name="Edit mask").click()
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("application", name="Mask").focus()
    for key in ("[", "[", " "):
        page.keyboard.press(key)
    page.get_by_role("button", name="Use mask").click()
    made_anew = mask_of(page)
    assert made_anew[32, 48] and 4 < made_anew.sum() < 200, "a small dot in the middle"


def test_images_are_taken_from_the_clipboard_and_dropped(page: Page) -> None:
    page.get_by_role("radio", name="Image", exact=True).check()
    script = """([event, target, data]) => {
        const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], event + ".png", {type: "image/png"}));
        const ways = {bubbles: true, cancelable: true, clipboardData: transfer, dataTransfer: transfer};
        const made = event === "paste" ? new ClipboardEvent(event, ways) : new DragEvent(event, ways);
        return !document.querySelector(target).dispatchEvent(made);
    }"""
    for event, target in (("paste", "#field-prompt"), ("drop", "[data-input=image]"), ("drop", "#stage")):
        taken = page.evaluate(script, [event, target, base64.b64encode(picture(32, 32)).decode()])
        assert taken, "the browser's own action is prevented"
        expect(page.locator(".file")).to_contain_text(f"{event}.png")
        page.get_by_role("button", name=f"Remove {event}.png").click()
        expect(page.locator(".file")).to_have_count(0)


# --- what was made before ---


def test_settings_are_taken_over_from_an_image_also_after_a_reload(page: Page, server: ServerProcess) -> None:
    generate(page, "Image", "a purple triangle", {**SMALL, "Seed": "9007199254740993", "Guidance": "3.5"})
    assert facts(page)["Seed"] == "9007199254740993", "more than a double holds"
    fill(page, "Video", "something else", {"Seed": "1", "Guidance": ""})
    go(page, server)
    expect(box(page, "Prompt")).to_have_value("something else")  # a draft survives a reload
    page.get_by_role("button", name="Show Image: a purple triangle").click()
    page.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_role("radio", name="Image", exact=True)).to_be_checked()
    for name, value in {"Prompt": "a purple triangle", "Seed": "9007199254740993", "Guidance": "3.5", **SMALL}.items():
        expect(box(page, name)).to_have_value(value)
    expect(box(page, "Prompt")).to_be_focused()


def test_settings_of_a_video_that_another_client_made_are_what_the_server_tells(
    page: Page, server: ServerProcess
) -> None:
    fields = {"prompt": "a cyan star", "size": "64x48", "num_frames": 9, "fps": 8, "num_inference_steps": 1, "seed": 5,
              "guidance_scale": 4.5, "negative_prompt": "blurry"}  # fmt: skip
    created = httpx.post(f"{server.url}/v1/videos", json=fields, timeout=30).json()
    go(page, server)  # it is followed to its end, if it still runs
    page.get_by_role("button", name="Show Video: a cyan star").click()
    expect(page.locator("#stage video")).to_be_visible(timeout=RESULT_MS)
    assert facts(page) | {"Time": "", "Made": ""} == {
        "Size": "64 × 48", "Length": "1 s", "Seed": "5", "Time": "", "Model": "demo", "Made": "",
    }  # fmt: skip
    page.get_by_role("button", name="Use these settings").click()
    taken = {"Width": "64", "Height": "48", "Frames": "9", "Frames per second": "8", "Seed": "5", "Steps": "1"}
    expect(page.locator("[name=negative_prompt]")).to_have_value("blurry")
    for name, value in {**taken, "Guidance": "4.5"}.items():
        expect(box(page, name)).to_have_value(value)
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("dialog", name="Delete it?").get_by_role("button", name="Delete").click()
    expect(page.locator(f"[data-key={created['id']}]")).to_have_count(0)
    assert api(server, f"/v1/videos/{created['id']}")["status_code"] == 404


def test_the_gallery_pages_through_the_servers_videos(page: Page, server: ServerProcess) -> None:
    """The list is answered here in the server's form: a hundred real videos would take a minute."""
    made = [{"id": f"video_{n:032x}", "object": "video", "created_at": 2_000_000_000 - n, "model": "demo",
             "size": "64x64", "status": "failed", "progress": 0, "seconds": "1", "prompt": f"number {n}",
             "seed": n, "num_frames": 17, "fps": 16, "notes": [], "error": {"code": "x", "message": "It broke."}}
            for n in range(60)]  # fmt: skip

    def answer(route: Route) -> None:
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(route.request.url).query))
        begin = next((i + 1 for i, video in enumerate(made) if video["id"] == query.get("after")), 0)
        data = made[begin : begin + int(query["limit"])]
        route.fulfill(json={"object": "list", "data": data, "has_more": begin + len(data) < len(made),
                            "first_id": data[0]["id"], "last_id": data[-1]["id"]})  # fmt: skip

    page.route(re.compile(r"/v1/videos\?"), answer)
    go(page, server)
    for count in (24, 48, 60):
        expect(page.locator(".card")).to_have_count(count)
        if count < 60:
            page.get_by_role("button", name="Show more").click()
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    page.get_by_role("radio", name="Images").check()
    expect(page.get_by_text("What you make gathers here")).to_be_visible()


def test_two_results_are_compared_side_by_side(page: Page) -> None:
    for seed in ("1", "2"):
        generate(page, "Image", "a star", {**SMALL, "Seed": seed})
    for index in (0, 1):
        page.locator(".card").nth(index).get_by_role("button", name="Compare Image: a star").click()
    page.get_by_role("region", name="Comparison").get_by_role("button", name="Compare").click()
    dialog = page.get_by_role("dialog", name="Compare")
    expect(dialog.get_by_role("img", name="a star")).to_have_count(2)
    left, right = (dialog.get_by_role("img").nth(i).bounding_box() for i in (0, 1))
    assert left and right and left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    rows = {row.locator("th").inner_text(): row.locator("td").all_inner_texts()
            for row in dialog.locator("tbody tr").all()}  # fmt: skip
    assert rows["Seed"] == ["2", "1"] and rows["Steps"] == ["2", "2"]
    assert "differs" in (dialog.locator("tr", has_text="Seed").get_attribute("class") or "")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_two_videos_are_compared_and_play_side_by_side(page: Page, tmp_path: Path) -> None:
    for steps in ("1", "2"):
        generate(page, "Video", "a blue square", {**SHORT_CLIP, "Seed": "3", "Steps": steps})
    for index in (0, 1):
        page.locator(".card").nth(index).get_by_role("button", name="Compare Video: a blue square").click()
    page.get_by_role("region", name="Comparison").get_by_role("button", name="Compare").click()
    dialog = page.get_by_role("dialog", name="Compare")
    videos = dialog.locator("video")
    expect(videos).to_have_count(2)
    dialog.get_by_role("button", name="Play both").click()
    expect(dialog.get_by_role("button", name="Pause both")).to_be_visible()
    assert videos.evaluate_all("(all) => all.map((video) => [video.videoWidth, video.paused])") == [[64, False]] * 2
    left, right = (videos.nth(i).bounding_box() for i in (0, 1))
    assert left and right and left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert dialog.locator("tr", has_text="Steps").locator("td").all_inner_texts() == ["2", "1"]
    page.screenshot(path=tmp_path / "compared.png")


# --- code ---


def code(page: Page, language: str) -> str:
    page.get_by_role("button", name="Show as code").click()
    page.get_by_role("tab", name=language).click()
    text = page.get_by_role("tabpanel", name=language).inner_text()
    page.get_by_role("button", name="Close").click()
    return text


def run_code(text: str, directory: Path) -> None:
    """As a user would, pasted into a shell or saved as a program."""
    command = ["bash", "-euo", "pipefail"] if text.startswith(("curl", "id=")) else [sys.executable, "-"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        command, input=text, cwd=directory, env=environment, text=True, capture_output=True, timeout=90
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


TRICKY = 'it\'s a "red" @circle; with $HOME, \\ and ünïcode\nand a second line'


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_an_image_is_made_by_the_copied_code(page: Page, tmp_path: Path, language: str) -> None:
    fill(page, "Image", TRICKY, {**SMALL, "Seed": "7", "Number of images": "2"})
    page.locator("#advanced > summary").click()
    page.get_by_role("combobox", name="File format").select_option("webp")
    run_code(code(page, language), tmp_path)
    for index in (0, 1):
        with Image.open(tmp_path / f"image-{index}.webp") as made:
            assert (made.format, made.size) == ("WEBP", (64, 64))
            recorded = json.loads(made.getexif().get_ifd(0x8769)[0x9286].decode("ascii").lstrip("ASCI\0"))
            assert (recorded["prompt"], recorded["seed"], recorded["num_inference_steps"]) == (TRICKY, 7 + index, 2)


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_a_video_is_made_by_the_copied_code(page: Page, tmp_path: Path, language: str) -> None:
    fill(page, "Video", TRICKY, SHORT_CLIP)
    run_code(code(page, language), tmp_path)
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_an_edit_with_a_mask_is_made_by_the_copied_code(page: Page, tmp_path: Path, language: str) -> None:
    fill(page, "Image", TRICKY, SMALL)
    attach(page)
    page.get_by_role("button", name="Draw mask").click()
    stroke(page, (0.2, 0.5), (0.8, 0.5))
    page.get_by_role("button", name="Use mask").click()
    page.get_by_role("button", name="Show as code").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Save mask.png").click()
    download.value.save_as(tmp_path / "mask.png")
    page.get_by_role("button", name="Close").click()
    (tmp_path / "cat.png").write_bytes(picture(96, 64))
    run_code(code(page, language), tmp_path)
    with Image.open(tmp_path / "image-0.png") as made:
        assert made.size == (64, 64)


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_a_video_from_a_video_is_made_by_the_copied_code(page: Page, tmp_path: Path, language: str) -> None:
    frames = [Image.new("RGB", (64, 64), (index * 40, 0, 0)) for index in range(5)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    fill(page, "Video", "a star", SMALL)
    page.locator("[data-input=video] input[type=file]").set_input_files(tmp_path / "clip.gif")
    run_code(code(page, language), tmp_path)
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"


def test_code_is_copied_and_holds_the_name_of_a_variable_in_place_of_the_key(
    page: Page, context: BrowserContext
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="API key").click()
    page.get_by_role("textbox", name="Key").fill("a-secret-of-some-length")
    page.get_by_role("button", name="Use key").click()
    fill(page, "Image", "a star", SMALL)
    assert 'os.environ["SGLANG_API_KEY"]' in code(page, "Python")
    page.get_by_role("button", name="Show as code").click()
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#toast")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert '-H "Authorization: Bearer $SGLANG_API_KEY"' in copied and "secret" not in copied
