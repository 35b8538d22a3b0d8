// The large view: a running job, a result, or what went wrong.

import { announce, button, calm, h, icon, byId, toast } from "./dom.js";
import { showCode } from "./code.js";
import { moment } from "./format.js";
import { download, factsOf, mediaElement } from "./items.js";
import { progressLine } from "./progress.js";

export class Stage {
  /** `use(settings)`, `remove(item)`, `compare(item)` and `askKey()` are called when the user asks for it. */
  constructor({ use, remove, compare, askKey }) {
    this._use = use;
    this._remove = remove;
    this._compare = compare;
    this._askKey = askKey;
    this._view = byId("stage-view");
    this._details = byId("stage-details");
    this.job = null;
    this.item = null;
  }

  /** Nothing yet. */
  showEmpty() {
    this.job = this.item = null;
    this._set([
      h("div", { class: "empty" },
        h("div", { class: "empty-mark" }, icon("sparkle")),
        h("h2", {}, "Nothing made yet"),
        h("p", { class: "muted" }, "Describe what you would like to see, then press Generate.")),
    ]);
  }

  /** A job, followed to its end. */
  showJob(job) {
    this.job = job;
    this.item = null;
    const picture = h("div", { class: "preview skeleton" }, icon(job.kind));
    const line = progressLine(job);
    const look = { text: "Cancel", kind: "plain", "aria-keyshortcuts": "Escape" };
    const foot = h("div", { class: "running-foot" }, line.element, button("x", "Cancel", () => job.cancel(), look));
    this._set(
      [h("div", { class: "running-view" }, picture, foot)],
      [h("p", { class: "stage-prompt" }, job.settings.params.prompt)],
    );
    const changed = () => {
      if (this.job !== job) return;
      if (job.preview && picture.firstElementChild?.src !== job.preview) {
        picture.replaceChildren(h("img", { src: job.preview, alt: "Preview" }));
        picture.classList.remove("skeleton");
      }
      if (!job.running) this._ended(job);
    };
    job.addEventListener("change", changed);
    changed();
  }

  async showItem(item, siblings = []) {
    this.job = null;
    this.item = item;
    if (item.failed) {
      this._showProblem("It failed", item.failed);
    } else {
      this._set([h("div", { class: "preview skeleton" })]);
      try {
        const media = await mediaElement(item, { autoplay: !calm() });
        if (this.item !== item) return;
        this._set([h("div", { class: "result" }, media)]);
      } catch (error) {
        if (this.item !== item) return;
        this._showProblem("It cannot be shown", error.message);
      }
    }
    this._details.replaceChildren(...this._about(item, siblings));
  }

  /** Shows nothing any more if it showed this. */
  gone(item) {
    if (this.item === item) this.showEmpty();
  }

  _set(view, details = []) {
    this._view.replaceChildren(...view);
    this._details.replaceChildren(...details);
  }

  _ended(job) {
    if (job.state === "done") {
      announce(`The ${job.kind} is finished`);
      this.showItem(job.results[0], job.results);
    } else if (job.state === "cancelled") {
      announce("Cancelled");
      this._showProblem("Cancelled", "Nothing was kept.", "x");
    } else {
      this._showProblem("It did not work", job.error.message, "warning", job.error.status === 401);
    }
  }

  _showProblem(title, text, iconName = "warning", key = false) {
    this._set([
      h("div", { class: `empty ${iconName === "warning" ? "bad" : ""}` },
        h("div", { class: "empty-mark" }, icon(iconName)),
        h("h2", {}, title),
        h("p", { class: "muted sentence" }, text),
        key && button("key", "Enter an API key", () => this._askKey(), { text: "Enter an API key", kind: "plain" })),
    ]);
  }

  _about(item, siblings) {
    const tool = (iconName, text, onclick) => button(iconName, text, onclick, { text, kind: "plain" });
    const tools = item.failed ? [] : [
      tool("download", "Download", () => download(item).catch((error) => toast(error.message))),
      tool("compare", "Compare", () => this._compare(item)),
    ];
    const fact = ([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
    const notes = item.notes.map((note) => h("li", {}, note));
    return [
      siblings.length > 1 && this._strip(item, siblings),
      h("p", { class: "stage-prompt" }, item.prompt),
      h("dl", { class: "facts" }, [...factsOf(item), ["Made", moment(item.created)]].map(fact)),
      notes.length > 0 && h("ul", { class: "notes", "aria-label": "Notes of the server" }, notes),
      h("div", { class: "actions" },
        tool("sliders", "Use these settings", async () => this._use(await item.settings())),
        tools,
        tool("code", "Code", async () => showCode(await item.settings())),
        h("span", { class: "spring" }),
        button("trash", "Delete", () => this._remove(item), { kind: "quiet danger" })),
    ].filter(Boolean);
  }

  /** The other images of the same job. */
  _strip(item, siblings) {
    const one = (each, index) => {
      const image = h("img", { alt: "" });
      each.media().then(({ url }) => (image.src = url));
      const label = `Image ${index + 1} of ${siblings.length}`;
      const state = { "aria-label": label, "aria-pressed": String(each === item) };
      return h("button", { type: "button", ...state, onclick: () => this.showItem(each, siblings) }, image);
    };
    return h("div", { class: "strip", role: "group", "aria-label": "Images of this job" }, siblings.map(one));
  }
}
