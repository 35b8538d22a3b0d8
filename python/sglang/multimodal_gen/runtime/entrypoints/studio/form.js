// The form: fields and files of the chosen mode, built anew when the mode changes; values survive where names agree.

import { apiKey } from "./api.js";
import { byId, button, h, icon } from "./dom.js";
import { plain } from "./format.js";
import { Field, drawnSeed } from "./field.js";
import { FileInput, acceptEverywhere } from "./inputs.js";
import { FIELD_OF_PARAM, formOf, groupName } from "./schema.js";

const DRAFT = "studio.draft";
const ASPECTS = [["1:1", 1], ["4:3", 4 / 3], ["16:9", 16 / 9], ["3:4", 3 / 4], ["9:16", 9 / 16]];
// What says something about an image or a video that is not there would be refused.
const NEEDS_INPUT = new Set([
  ...["strength", "image_cond_noise_scale", "frame_index", "image_embed_interleave", "auto_resize"],
]);

export class SettingsForm {
  constructor({ changed }) {
    this._changed = changed;
    this._page = null;
    this._model = null;
    this.mode = null;
    this.fields = new Map();
    this.inputs = new Map();
    acceptEverywhere(() => [...this.inputs.values()]);
  }

  get ready() {
    return this.mode !== null;
  }

  /** Build the form for what the server says it takes. */
  describe(page, model, modes) {
    this._page = page;
    this._model = model;
    const draft = readDraft();
    this._build(modes.includes(draft?.mode) ? draft.mode : modes[0]);
    if (draft !== null) this._fill(draft.values);
  }

  /** Switch to the other mode. */
  setMode(mode) {
    if (mode === this.mode || this._page === null) return;
    const values = this._raw();
    const files = [...this.inputs.values()].filter((input) => input.spec.kind === "image")[0];
    this._build(mode);
    this._fill(values);
    const [first] = [...this.inputs.values()].filter((input) => input.spec.kind === "image");
    if (files?.files.length && first) first.set(files.files.slice(0, first.spec.most), files.mask);
    this._onChange();
  }

  /**
   * What the form says: `kind`, `params` as they are sent, `files` by field. A seed is drawn where none is given, so
   * that the result can be made again.
   */
  settings() {
    const params = {};
    const files = {};
    for (const input of this.inputs.values()) {
      if (input.files.length > 0) files[input.name] = input.files;
      if (input.mask !== null) files.mask = [input.mask];
    }
    for (const [name, field] of this.fields) {
      if (field.value === undefined || field.element.hidden) continue;
      params[name] = field.value;
    }
    params.prompt ??= "";
    if (this.fields.has("seed")) params.seed ??= drawnSeed();
    const named = [params.width, params.height];
    if (named.every((side) => typeof side === "number")) {
      delete params.width;
      delete params.height;
      params.size = named.join("x");
    }
    return { kind: this.mode, params, files, model: this._model.id, total: this._total(params) };
  }

  /** Take over the settings of a result. */
  use(settings) {
    this._build(settings.kind);
    const { size, ...params } = settings.params;
    if (size) [params.width, params.height] = size.split("x");
    this._fill(params);
    for (const input of this.inputs.values()) {
      input.set(settings.files?.[input.name] ?? [], input.spec.mask ? (settings.files?.mask?.[0] ?? null) : null);
    }
    this._onChange();
  }

  /** Show an error at its field. Returns whether there is one. */
  fail(error) {
    this.clearProblems();
    const name = FIELD_OF_PARAM[error.param] ?? error.param;
    const input = this.inputs.get(name) ?? [...this.inputs.values()].find((each) => name === "mask" && each.spec.mask);
    if (input) return this._failInput(input, error);
    const field = this.fields.get(name);
    if (field === undefined || field.element.hidden) return false;
    for (let parent = field.element.parentElement; parent; parent = parent.parentElement) {
      if (parent.tagName === "DETAILS") parent.open = true;
    }
    field.fail(error.message);
    field.control.focus();
    field.element.scrollIntoView({ block: "nearest" });
    return true;
  }

  clearProblems() {
    for (const each of [...this.fields.values(), ...this.inputs.values()]) each.clearProblem();
  }

  /** Show or hide what only holders of a key may set. */
  keyChanged() {
    for (const field of this.fields.values()) {
      if (field.spec.admin) field.element.hidden = apiKey() === null;
    }
    this._hideEmptyGroups();
  }

  _failInput(input, error) {
    input.fail(error.message);
    input.focus();
    return true;
  }

  _total(params) {
    const steps = params.num_inference_steps ?? this.fields.get("num_inference_steps")?.spec.initial;
    return typeof steps === "number" ? steps : null;
  }

  // --- building ---

  _build(mode) {
    this.mode = mode;
    const { fields, inputs } = formOf(this._page, this._model, mode);
    this.fields = new Map(fields.map((spec) => [spec.name, new Field(spec, () => this._onChange())]));
    this.inputs = new Map(inputs.map((spec) => [spec.name, new FileInput(spec, () => this._onChange())]));
    for (const radio of document.querySelectorAll('input[name="mode"]')) radio.checked = radio.value === mode;
    const of = (name) => this.fields.get(name)?.element ?? null;
    byId("prompt-slot").replaceChildren(...[of("prompt"), this._negative()].filter(Boolean));
    byId("inputs-slot").replaceChildren(...[...this.inputs.values()].map((input) => input.element));
    byId("basic-slot").replaceChildren(...this._basic());
    byId("advanced-slot").replaceChildren(...this._advanced());
    const question = mode === "video" ? "What should move, and how?" : "What should the image show?";
    this.fields.get("prompt")?.control.setAttribute("placeholder", question);
    this.keyChanged();
    this._notes();
  }

  _negative() {
    const field = this.fields.get("negative_prompt");
    const summary = field && h("summary", {}, icon("chevron"), field.spec.label);
    return field && h("details", { class: "fold slim" }, summary, field.element);
  }

  _basic() {
    const rows = [];
    const size = ["width", "height"].map((name) => this.fields.get(name)).filter(Boolean);
    if (size.length === 2) rows.push(this._sizeGroup(size));
    for (const field of this.fields.values()) {
      if (field.spec.basic && !size.includes(field)) rows.push(field.element);
    }
    return rows;
  }

  _sizeGroup([width, height]) {
    const swap = button("swap", "Swap width and height", () => {
      const [w, v] = [width.value ?? width.spec.initial ?? undefined, height.value ?? height.spec.initial ?? undefined];
      this._setSize(v, w);
    }, { kind: "plain" });
    const chip = ([name, ratio]) => {
      const onclick = () => this._setSize(...this._sizeFor(ratio));
      return h("button", { type: "button", class: "chip", "aria-label": `Aspect ratio ${name}`, onclick }, name);
    };
    const chips = this._area() === null ? [] : ASPECTS.map(chip);
    return h(
      "fieldset", { class: "size" },
      h("legend", { class: "visually-hidden" }, "Size in pixels"),
      h("div", { class: "size-row" }, width.element, swap, height.element),
      chips.length > 0 && h("div", { class: "chips", role: "group", "aria-label": "Aspect ratio" }, chips),
    );
  }

  _area() {
    const rule = this._model.limits?.area_rule?.area ?? this._model.limits?.size_from_image?.area;
    const { width, height } = this._model.defaults ?? {};
    return width && height ? width * height : (rule ?? null);
  }

  _sizeFor(ratio) {
    const multiple = this._model.limits?.size_multiple ?? 16;
    const side = (exact) => Math.max(multiple, Math.round(exact / multiple) * multiple);
    return [side(Math.sqrt(this._area() * ratio)), side(Math.sqrt(this._area() / ratio))];
  }

  _setSize(width, height) {
    this.fields.get("width").value = width;
    this.fields.get("height").value = height;
    this._onChange();
  }

  _advanced() {
    const groups = new Map();
    for (const field of this.fields.values()) {
      const { basic, inPlace, group, admin } = field.spec;
      if (basic || inPlace) continue;
      const key = admin ? "observation" : group;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(field.element);
    }
    const last = ["some", "observation"];
    const order = [...groups.keys()].toSorted((a, b) => last.indexOf(a) - last.indexOf(b));
    return order.map((group) => {
      const name = groupName(group);
      const title = h("h3", {}, name);
      return h("section", { class: "group", "aria-label": name, dataset: { group } }, title, groups.get(group));
    });
  }

  _hideEmptyGroups() {
    for (const section of byId("advanced-slot").children) {
      section.hidden = [...section.querySelectorAll(".field")].every((field) => field.hidden);
    }
  }

  // --- values ---

  _fill(values) {
    for (const [name, field] of this.fields) field.value = values[name];
    const folded = this.fields.get("negative_prompt");
    const fold = folded?.element.closest("details");
    if (fold && folded.value !== undefined) fold.open = true;
    this._notes();
  }

  _raw() {
    const given = [...this.fields].map(([name, field]) => [name, field.value]);
    return Object.fromEntries(given.filter(([, value]) => value !== undefined));
  }

  _onChange() {
    this._notes();
    const plainly = (_, value) => (typeof value === "bigint" ? String(value) : value);
    sessionStorage.setItem(DRAFT, JSON.stringify({ mode: this.mode, values: this._raw() }, plainly));
    this._changed();
  }

  /** What follows from other fields: the length of a clip, what only matters with an image, which aspect is chosen. */
  _notes() {
    const number = (name) => {
      const field = this.fields.get(name);
      return field ? Number(field.value ?? field.spec.initial) : NaN;
    };
    const [frames, fps] = [number("num_frames"), number("fps")];
    if (frames > 0 && fps > 0) {
      const length = `${plain((frames - 1) / fps)} s at ${plain(fps)} frames a second`;
      this.fields.get("num_frames").note.textContent = length;
    }
    const hasInput = [...this.inputs.values()].some((input) => input.files.length > 0);
    for (const name of NEEDS_INPUT) {
      const field = this.fields.get(name);
      if (field) field.element.hidden = !hasInput;
    }
    const chosen = this._area() === null ? [] : ASPECTS.map(([, ratio]) => this._sizeFor(ratio).join("x"));
    document.querySelectorAll(".size .chip").forEach((chip, index) => {
      chip.setAttribute("aria-pressed", String(chosen[index] === `${number("width")}x${number("height")}`));
    });
    this._hideEmptyGroups();
  }
}

function readDraft() {
  try {
    return JSON.parse(sessionStorage.getItem(DRAFT));
  } catch {
    return null; // written by another release of the page
  }
}
