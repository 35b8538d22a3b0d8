// Files to start from: chosen, dropped or pasted; and the mask of the first image.

import { announce, button, h } from "./dom.js";
import { fileSize } from "./format.js";
import { drawMask } from "./mask.js";

const FORMATS = { image: "PNG, JPEG, WebP or BMP", video: "MP4, WebM or GIF" };
const ACCEPTED = {
  image: "image/png,image/jpeg,image/webp,image/bmp",
  video: "video/mp4,video/webm,video/quicktime,image/gif",
};

/** One file field of a call, such as `image`. `changed` is called when its files change. */
export class FileInput {
  constructor(spec, changed) {
    this.spec = spec;
    this.name = spec.name;
    this.files = [];
    this.mask = null;
    this._changed = changed;
    this._urls = [];
    this._chooser = h("input", {
      type: "file",
      class: "visually-hidden",
      tabindex: "-1",
      "aria-label": `${spec.label} file`,
      accept: ACCEPTED[spec.kind],
      multiple: spec.most > 1,
      onchange: () => this._chosen(),
    });
    this._list = h("ul", { class: "files", "aria-label": `${spec.label}: files` });
    this._drop = button("arrow_up", `Add ${spec.label.toLowerCase()}`, () => this._chooser.click(), {
      text: "", kind: "drop", "aria-describedby": `input-${spec.name}-help input-${spec.name}-problem`,
    });
    this._problem = h("p", { class: "problem", id: `input-${spec.name}-problem`, hidden: true });
    this.element = this._layout();
    this._render();
  }

  /** Whether a file of this type could be meant for this field. */
  takes(type) {
    if (this.spec.kind === "image") return type.startsWith("image/");
    return type.startsWith("video/") || type === "image/gif";
  }

  /** More files; where only one may be given the last one stays. */
  add(files) {
    const taken = [...files].filter((file) => this.takes(file.type));
    if (taken.length === 0) return;
    this.set([...(this.spec.most > 1 ? this.files : []), ...taken].slice(-this.spec.most));
    announce(`${this.spec.label}: ${taken.map((file) => file.name).join(", ")} added`);
  }

  /** These files, and a mask of the first. */
  set(files, mask = null) {
    if (files[0] !== this.files[0] || mask !== null) this.mask = mask;
    this.files = files;
    this.clearProblem();
    this._render();
    this._changed();
  }

  fail(message) {
    this._problem.textContent = message;
    this._problem.hidden = false;
    this.element.classList.add("failed");
  }

  clearProblem() {
    this._problem.hidden = true;
    this.element.classList.remove("failed");
  }

  focus() {
    (this._list.querySelector("button") ?? this._drop).focus();
  }

  _chosen() {
    this.add(this._chooser.files);
    this._chooser.value = ""; // so that the same file can be chosen again
  }

  _layout() {
    const { spec } = this;
    const needed = spec.required && h("span", { class: "tag" }, "needed");
    const formats = FORMATS[spec.kind] + (spec.most > 1 ? `, up to ${spec.most}` : "");
    const element = h(
      "div",
      { class: "field input", dataset: { input: spec.name } },
      h("div", { class: "row" }, h("span", { class: "label" }, spec.label), needed),
      this._list,
      this._drop,
      this._chooser,
      h("p", { class: "help", id: `input-${spec.name}-help`, title: spec.help }, formats),
      this._problem,
    );
    element.addEventListener("dragover", (event) => {
      event.preventDefault();
      element.classList.add("over");
    });
    element.addEventListener("dragleave", () => element.classList.remove("over"));
    element.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      element.classList.remove("over");
      this.add(event.dataTransfer.files);
    });
    return element;
  }

  _render() {
    this._urls.forEach((url) => URL.revokeObjectURL(url));
    this._urls = [];
    this._list.replaceChildren(...this.files.map((file, index) => this._item(file, index)));
    this._list.hidden = this.files.length === 0;
    const { most, label } = this.spec;
    this._drop.hidden = most === 1 && this.files.length > 0;
    const one = label === "Image" ? "an image" : `the ${label.toLowerCase()}`;
    const more = this.files.length > 0 ? `Add another ${label.toLowerCase()}` : `Drop, paste or choose ${one}`;
    this._drop.querySelector("span").textContent = more;
    this._drop.setAttribute("aria-label", more);
    this._drop.title = "";
  }

  _item(file, index) {
    const { spec } = this;
    const url = URL.createObjectURL(file);
    this._urls.push(url);
    const shown = file.type.startsWith("video/")
      ? h("video", { src: url, muted: true, preload: "metadata", "aria-hidden": "true" })
      : h("img", { src: url, alt: "" });
    const masked = index === 0 && spec.mask;
    const draw = this.mask ? "Edit mask" : "Draw mask";
    return h(
      "li",
      { class: "file" },
      h("div", { class: "file-picture" }, shown),
      h("div", { class: "file-facts" },
        h("span", { class: "file-name" }, file.name || "pasted image"),
        h("span", { class: "muted" }, fileSize(file.size), masked && this.mask ? " · masked" : "")),
      masked && button("brush", draw, () => this._editMask(), { text: draw, kind: "plain small" }),
      button("x", `Remove ${file.name || "image"}`, () => this._remove(index), { kind: "quiet small" }),
    );
  }

  _remove(index) {
    if (index === 0) this.mask = null;
    this.set(this.files.filter((_, other) => other !== index), index === 0 ? null : this.mask);
    this.focus();
  }

  async _editMask() {
    const mask = await drawMask(this.files[0], this.mask);
    if (mask === undefined) return; // cancelled
    this.mask = mask;
    this.clearProblem();
    this._render();
    this._changed();
    announce(mask === null ? "The mask was removed" : "The mask was saved");
    this.focus();
  }
}

/** Files dropped anywhere on the page, or pasted, go to the first of `inputs()` that takes them. */
export function acceptEverywhere(inputs) {
  const give = (files) => {
    for (const input of inputs()) {
      const taken = [...files].filter((file) => input.takes(file.type));
      if (taken.length > 0) {
        input.add(taken);
        return true;
      }
    }
    return false;
  };
  addEventListener("paste", (event) => {
    if (!document.querySelector("dialog[open]") && give(event.clipboardData.files)) event.preventDefault();
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault(); // else the browser would leave the page for the file
    give(event.dataTransfer.files);
  });
}
