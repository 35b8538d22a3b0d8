// Drawing what is made anew: a canvas over the image, and the PNG that is transparent there.

import { ask, byId, button, h } from "./dom.js";

const MAX_UNDONE = 30;
const MAX_UNDONE_BYTES = 2 ** 28;
const TINT = [124, 92, 255];
const KEY_STEP = 0.02; // of the image's longer side, for a brush that arrow keys move

/**
 * Lets the user draw over `file`. Resolves with a PNG of the image's size whose transparent pixels are made anew, null
 * when nothing is painted, undefined when it was cancelled. `before`: the mask to go on from.
 */
export async function drawMask(file, before) {
  const image = await createImageBitmap(file);
  const editor = new MaskEditor(image);
  if (before !== null) await editor.load(before);
  const dialog = byId("mask-dialog");
  dialog.replaceChildren(editor.element);
  const closed = ask(dialog);
  editor.canvas.focus();
  const answer = await closed;
  dialog.replaceChildren();
  image.close();
  return answer === "apply" ? editor.result : undefined;
}

class MaskEditor {
  constructor(image) {
    this._size = [image.width, image.height];
    this._undone = [];
    this._done = [];
    this._erasing = false;
    this._last = null;
    this._cursor = [image.width / 2, image.height / 2];
    this._brush = Math.max(2, Math.round(Math.max(...this._size) / 10));
    // Painted pixels are opaque in here; shown through the canvas's opacity, turned round in `_mask`.
    this.canvas = h("canvas", {
      width: image.width,
      height: image.height,
      tabindex: "0",
      role: "application",
      "aria-label": "Mask. Arrow keys move the brush, Space paints, B and E choose brush or eraser, brackets its size.",
      onpointerdown: (event) => this._down(event),
      onpointermove: (event) => this._move(event),
      onpointerup: () => (this._last = null),
      onpointerleave: () => (this._ring.hidden = true),
      onkeydown: (event) => this._onKey(event),
    });
    this._pen = this.canvas.getContext("2d", { willReadFrequently: true });
    const [width, height] = this._size;
    this._picture = h("canvas", { width, height, class: "mask-picture", "aria-hidden": "true" });
    this._picture.getContext("2d").drawImage(image, 0, 0);
    this._ring = h("div", { class: "mask-ring", hidden: true, "aria-hidden": "true" });
    this.element = this._layout();
    this._refresh();
  }

  /** Go on from a mask made before. */
  async load(blob) {
    const image = await createImageBitmap(blob);
    this._pen.fillStyle = `rgb(${TINT.join(" ")})`;
    this._pen.fillRect(0, 0, ...this._size);
    this._pen.globalCompositeOperation = "destination-out";
    this._pen.drawImage(image, 0, 0, ...this._size);
    image.close();
    this._refresh();
  }

  /** Closes only once the PNG is there: whoever generates right after that sends it. */
  async _apply() {
    this.result = await this._mask();
    byId("mask-dialog").close("apply");
  }

  /** The PNG, or null when nothing is painted. */
  async _mask() {
    const painted = this._pixels();
    if (!painted.data.some((value, index) => index % 4 === 3 && value > 127)) return null;
    for (let index = 0; index < painted.data.length; index += 4) {
      const opaque = painted.data[index + 3] > 127 ? 0 : 255;
      painted.data.set([0, 0, 0, opaque], index);
    }
    const canvas = new OffscreenCanvas(...this._size);
    canvas.getContext("2d").putImageData(painted, 0, 0);
    const blob = await canvas.convertToBlob({ type: "image/png" });
    return new File([blob], "mask.png", { type: "image/png" });
  }

  _pixels() {
    return this._pen.getImageData(0, 0, ...this._size);
  }

  _layout() {
    this._tools = {
      brush: button("brush", "Brush", () => this._choose(false), { text: "Brush", kind: "tool" }),
      eraser: button("eraser", "Eraser", () => this._choose(true), { text: "Eraser", kind: "tool" }),
    };
    this._sizer = h("input", {
      type: "range",
      min: 1,
      max: Math.round(Math.max(...this._size) / 3),
      value: this._brush,
      "aria-label": "Brush size",
      oninput: (event) => this._resize(Number(event.target.value)),
    });
    this._sizer.style.setProperty("--filled", `${(100 * this._brush) / Number(this._sizer.max)}%`);
    this._undo = button("undo", "Undo", () => this._step(this._done, this._undone));
    this._redo = button("redo", "Redo", () => this._step(this._undone, this._done));
    return h(
      "div",
      { class: "mask", onkeydown: (event) => this._onShortcut(event) },
      h("div", { class: "dialog-head" },
        h("h2", { id: "mask-title" }, "Draw a mask"),
        h("p", { class: "muted" }, "Paint over what is to be made anew. Everything else stays.")),
      h("div", { class: "toolbar", role: "toolbar", "aria-label": "Mask tools" },
        h("div", { class: "segmented" }, this._tools.brush, this._tools.eraser),
        h("label", { class: "brush-size" }, h("span", {}, "Size"), this._sizer),
        h("span", { class: "spring" }),
        this._undo, this._redo,
        button("invert", "Invert", () => this._invert()),
        button("trash", "Clear", () => this._clear())),
      h("div", { class: "mask-stage" }, h("div", { class: "mask-stack" }, this._picture, this.canvas, this._ring)),
      h("div", { class: "dialog-foot" },
        button(null, "Cancel", () => byId("mask-dialog").close("cancel"), { text: "Cancel", kind: "plain" }),
        button(null, "Use mask", () => this._apply(), { text: "Use mask", kind: "primary" })),
    );
  }

  _choose(erasing) {
    this._erasing = erasing;
    this._refresh();
  }

  _resize(size) {
    this._brush = Math.min(Number(this._sizer.max), Math.max(1, Math.round(size)));
    this._sizer.value = String(this._brush);
    this._sizer.style.setProperty("--filled", `${(100 * this._brush) / Number(this._sizer.max)}%`);
    this._showRing();
  }

  _refresh() {
    this._tools.brush.setAttribute("aria-pressed", String(!this._erasing));
    this._tools.eraser.setAttribute("aria-pressed", String(this._erasing));
    this._undo.disabled = this._done.length === 0;
    this._redo.disabled = this._undone.length === 0;
  }

  // --- painting ---

  _at(event) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    return [((event.clientX - left) / width) * this._size[0], ((event.clientY - top) / height) * this._size[1]];
  }

  _down(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.canvas.focus();
    this._remember();
    this._last = this._cursor = this._at(event);
    this._line(this._last, this._last);
  }

  _move(event) {
    this._cursor = this._at(event);
    this._showRing();
    if (this._last === null) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) {
      const to = this._at(each);
      this._line(this._last, to);
      this._last = to;
    }
  }

  _line(from, to) {
    const pen = this._pen;
    pen.globalCompositeOperation = this._erasing ? "destination-out" : "source-over";
    pen.strokeStyle = `rgb(${TINT.join(" ")})`;
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = this._brush;
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(to[0], to[1] + 0.01);
    pen.stroke();
  }

  _showRing() {
    const scale = this.canvas.getBoundingClientRect().width / this._size[0];
    const style = this._ring.style;
    this._ring.hidden = false;
    style.width = style.height = `${this._brush * scale}px`;
    style.left = `${this._cursor[0] * scale}px`;
    style.top = `${this._cursor[1] * scale}px`;
  }

  _onKey(event) {
    const step = Math.max(1, Math.max(...this._size) * KEY_STEP) * (event.shiftKey ? 5 : 1);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) this._moveBy(moves[event.key]);
    else if (event.key === " ") this._stamp();
    else return;
    event.preventDefault();
  }

  /** Keys that mean the same wherever the focus is in the dialog. */
  _onShortcut(event) {
    const command = event.ctrlKey || event.metaKey;
    if (command && event.key.toLowerCase() === "z") event.shiftKey ? this._redo.click() : this._undo.click();
    else if (command) return;
    else if (event.key === "b") this._choose(false);
    else if (event.key === "e") this._choose(true);
    else if (event.key === "[") this._resize(this._brush / 1.25);
    else if (event.key === "]") this._resize(this._brush * 1.25 + 1);
    else return;
    event.preventDefault();
  }

  _moveBy([x, y]) {
    this._cursor = [
      Math.min(this._size[0], Math.max(0, this._cursor[0] + x)),
      Math.min(this._size[1], Math.max(0, this._cursor[1] + y)),
    ];
    this._showRing();
  }

  _stamp() {
    this._remember();
    this._line(this._cursor, this._cursor);
    this._showRing();
  }

  // --- what was done ---

  _remember() {
    this._done.push(this._pixels());
    const most = Math.min(MAX_UNDONE, Math.max(2, MAX_UNDONE_BYTES / (4 * this._size[0] * this._size[1])));
    if (this._done.length > most) this._done.shift();
    this._undone = [];
    this._redo.disabled = true;
    this._undo.disabled = false;
  }

  _step(from, to) {
    if (from.length === 0) return;
    to.push(this._pixels());
    this._pen.putImageData(from.pop(), 0, 0);
    this._refresh();
    if (from.length === 0) this.canvas.focus(); // the button is disabled now and would take the focus along
  }

  _clear() {
    this._remember();
    this._pen.clearRect(0, 0, ...this._size);
  }

  _invert() {
    this._remember();
    const pixels = this._pixels();
    for (let index = 0; index < pixels.data.length; index += 4) {
      pixels.data.set([...TINT, pixels.data[index + 3] > 127 ? 0 : 255], index);
    }
    this._pen.putImageData(pixels, 0, 0);
  }
}
