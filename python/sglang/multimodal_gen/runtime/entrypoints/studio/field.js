// One parameter of the form: its control, its value, and what the server says is wrong with it.

import { button, h } from "./dom.js";
import { numberOf } from "./format.js";
import { defaultOf, sliderRange, stepOf } from "./schema.js";

const MAX_DRAWN_SEED = 2 ** 32;

/** A seed that nobody chose. */
export const drawnSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % MAX_DRAWN_SEED;

/**
 * A field of the form. Empty means: not sent, so that the model's default holds. `changed` is called when the user
 * changes it.
 */
export class Field {
  constructor(spec, changed) {
    this.spec = spec;
    this.name = spec.name;
    this._changed = changed;
    this._id = `field-${spec.name}`;
    this.control = this._control();
    this.slider = this._slider();
    this._reset = button("reset", `Reset ${spec.label} to the default`, () => this._back(), { kind: "quiet reset" });
    this._problem = h("p", { class: "problem", id: `${this._id}-problem`, hidden: true });
    this.note = h("p", { class: "note", id: `${this._id}-note` });
    this.element = this._layout();
    this.value = undefined;
  }

  /** The value as it is sent; undefined when it is not. What is no number goes as it is: the server says so. */
  get value() {
    const { kind, list } = this.spec;
    if (kind === "switch" && !this.spec.optional) {
      return this.control.checked === Boolean(this.spec.initial) ? undefined : this.control.checked;
    }
    const text = this.control.value;
    if (text.trim() === "") return undefined;
    if (kind === "switch") return text === "true";
    if (kind === "json") return jsonOf(text);
    const one = (part) => (kind === "integer" || kind === "number" ? (numberOf(part) ?? part.trim()) : part);
    return list && text.includes(",") ? text.split(",").map((part) => one(part)) : one(text);
  }

  set value(value) {
    if (this.spec.kind === "switch" && !this.spec.optional) {
      this.control.checked = value === undefined ? Boolean(this.spec.initial) : Boolean(value);
    } else {
      this.control.value = value === undefined || value === null ? "" : textOf(value);
    }
    this._show();
  }

  /** Shows the server's sentence at this field. */
  fail(message) {
    this._problem.textContent = message;
    this._problem.hidden = false;
    this.element.classList.add("failed");
    this.control.setAttribute("aria-invalid", "true");
  }

  clearProblem() {
    this._problem.hidden = true;
    this.element.classList.remove("failed");
    this.control.removeAttribute("aria-invalid");
  }

  _back() {
    this.value = undefined;
    this.control.focus();
    this._edited();
  }

  _edited() {
    this.clearProblem();
    this._show();
    this._changed(this);
  }

  _show() {
    const set = this.value !== undefined;
    this.element.classList.toggle("set", set);
    this._reset.hidden = !set || this.name === "prompt";
    if (this.slider === null) return;
    const { min, max } = this.slider;
    const middle = (Number(min) + Number(max)) / 2; // where nobody knows the default
    const number = Number(this.control.value === "" ? (this.spec.initial ?? middle) : this.control.value);
    if (Number.isFinite(number)) this.slider.value = String(number);
    const { value } = this.slider;
    const unknown = !set && typeof this.spec.initial !== "number";
    this.element.classList.toggle("unknown", unknown);
    this.slider.style.setProperty("--filled", `${unknown ? 0 : (100 * (value - min)) / (max - min || 1)}%`);
  }

  _control() {
    const { spec, _id: id } = this;
    const shared = {
      id,
      name: spec.name,
      "aria-describedby": `${id}-help ${id}-note ${id}-problem`,
      oninput: () => this._edited(),
    };
    if (spec.kind === "choice" || (spec.kind === "switch" && spec.optional)) return this._select(shared);
    if (spec.kind === "switch") return h("input", { ...shared, type: "checkbox", role: "switch", class: "switch" });
    const number = spec.kind === "integer" || spec.kind === "number";
    const placeholder = number && spec.initial === null && spec.name !== "seed" ? "auto" : defaultOf(spec);
    if (!number && (spec.kind === "json" || (spec.maxLength ?? 0) > 1000)) {
      return h("textarea", { ...shared, rows: 2, placeholder, maxlength: spec.maxLength });
    }
    return h("input", {
      ...shared,
      type: "text",
      inputmode: number ? (spec.kind === "integer" && !spec.list ? "numeric" : "decimal") : null,
      placeholder,
      autocomplete: "off",
      spellcheck: "false",
      onkeydown: number ? (event) => this._onKey(event) : null,
    });
  }

  _select(shared) {
    const { spec } = this;
    const initial = defaultOf(spec);
    const choices = spec.choices?.map((each) => [each, each]);
    const options = choices ?? [["true", "Yes"], ["false", "No"]];
    return h(
      "select",
      shared,
      h("option", { value: "" }, initial === "" ? "Default" : `Default: ${initial}`),
      options.map(([value, text]) => h("option", { value }, text)),
    );
  }

  _slider() {
    const { spec } = this;
    const isNumber = spec.kind === "integer" || spec.kind === "number";
    const range = isNumber && !["width", "height"].includes(spec.name) ? sliderRange(spec) : null;
    if (range === null) return null;
    const [min, max] = range;
    return h("input", {
      type: "range",
      min,
      max,
      step: stepOf(spec),
      "aria-label": `${spec.label}, slider`,
      oninput: (event) => {
        this.control.value = event.target.value;
        this._edited();
      },
    });
  }

  /** Arrow keys step a number, as in a browser's own number field; ten steps with Shift. */
  _onKey(event) {
    const { key, altKey, ctrlKey, metaKey } = event;
    if ((key !== "ArrowUp" && key !== "ArrowDown") || altKey || ctrlKey || metaKey) return;
    const now = numberOf(this.control.value || String(this.spec.initial ?? this.spec.minimum ?? 0));
    if (typeof now !== "number") return;
    event.preventDefault();
    const step = stepOf(this.spec) * (event.shiftKey ? 10 : 1) * (event.key === "ArrowUp" ? 1 : -1);
    const { minimum, maximum } = this.spec;
    const next = Math.min(maximum ?? Infinity, Math.max(minimum ?? -Infinity, now + step));
    this.control.value = String(Number(next.toFixed(6)));
    this._edited();
  }

  _layout() {
    const { spec, _id: id } = this;
    const label = h("label", { for: id }, spec.label);
    const help = h("p", { class: "help", id: `${id}-help` }, spec.help);
    if (spec.kind === "switch" && !spec.optional) {
      const row = h("div", { class: "row" }, label, this._reset, this.control);
      return h("div", { class: "field", dataset: { field: spec.name } }, row, help, this.note, this._problem);
    }
    const extra = spec.name === "seed" ? this._dice() : null;
    return h(
      "div",
      { class: `field field-${spec.kind}${this.slider ? " has-slider" : ""}`, dataset: { field: spec.name } },
      h("div", { class: "row" }, label, this._reset, this.slider && this.control),
      this.slider ?? h("div", { class: "row joined" }, this.control, extra),
      help,
      this.note,
      this._problem,
    );
  }

  _dice() {
    return button("dice", "Draw a seed", () => {
      this.value = drawnSeed();
      this._edited();
    }, { kind: "plain" });
  }
}

function jsonOf(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text; // the server says what is wrong with it
  }
}

function textOf(value) {
  if (Array.isArray(value)) return value.join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
