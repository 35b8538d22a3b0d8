// Building elements, icons, and telling screen readers what happened.

const SVG = "http://www.w3.org/2000/svg";

// Strokes on a 24 x 24 grid.
const ICONS = {
  arrow_up: "M12 19V5M6 11l6-6 6 6",
  brush:
    "M9.5 14.5 19 5a2 2 0 0 0-3-3L7 12" +
    "M9 12c-3 0-4 2-4 4.5C5 19 3.5 20 2 20c1.5 1.5 3.5 2 5.500 2C10 22 12 20 12 17.500c0-1.500-1-3-3-5.500",
  check: "m5 12.500 4.500 4.500L19 7.500",
  chevron: "m9 6 6 6-6 6",
  code: "m8 7-5 5 5 5M16 7l5 5-5 5M13.500 5l-3 14",
  compare: "M12 3v18M4 6h5v12H4zM15 6h5v12h-5z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  dice:
    "M5 4h14a1 1 0 0 1 1 1v14a1 1 0 0 1-1 1H5a1 1 0 0 1-1-1V5a1 1 0 0 1 1-1z" +
    "M8.500 8.300v.4M15.500 8.300v.4M12 11.800v.4M8.500 15.300v.4M15.500 15.300v.4",
  download: "M12 4v11M7 10.500l5 5 5-5M5 20h14",
  eraser: "m7 20-4-4a1.500 1.500 0 0 1 0-2L13 4a2 2 0 0 1 2.500 0L20 8.500a2 2 0 0 1 0 2.500l-9 9zM8 9l7 7M7 20h14",
  image: "M4 4h16v16H4zM4 16l4.500-4.500L13 16l2.500-2.500L20 18M15.500 8.500h.01",
  invert: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zM12 3v18M12 8h6.500M12 13h8.500M12 17.500h6",
  key: "M14.500 9.500a4.500 4.500 0 1 0-4 4.400l1.500 1.600h2V18h2.500v2.500H20v-3z M9 9h.01",
  moon: "M20 14.500A8 8 0 0 1 9.500 4a8 8 0 1 0 10.500 10.500z",
  pause: "M8 5v14M16 5v14",
  play: "M7 4.500v15l12-7.500z",
  plus: "M12 5v14M5 12h14",
  redo: "M20 9H9.500a5 5 0 0 0 0 10H14M20 9l-4.500-4.500M20 9l-4.500 4.500",
  reset: "M4 4v5.500h5.500M4.500 9.500A8 8 0 1 1 4 13.500",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.500v5M9 14.500v5",
  sparkle: "M12 3l2 6.500 6.500 2.500-6.500 2.500-2 6.500-2-6.500L3.500 12 10 9.500z",
  sun:
    "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8z" +
    "M12 2.500v2M12 19.500v2M2.500 12h2M19.500 12h2" +
    "M5.300 5.300l1.400 1.400M17.300 17.300l1.400 1.400M18.700 5.300l-1.400 1.400M6.700 17.300l-1.400 1.400",
  swap: "M4 8h14M14 4l4 4-4 4M20 16H6M10 12l-4 4 4 4",
  trash: "M4 6.500h16M9 6.500V4h6v2.500M6 6.500 7 20h10l1-13.500M10 10.500v6M14 10.500v6",
  undo: "M4 9h10.500a5 5 0 0 1 0 10H10M4 9l4.500-4.500M4 9l4.500 4.500",
  video: "M3 6h12v12H3zM15 10.500l6-3.500v10l-6-3.500",
  warning: "M12 4 2.500 20h19zM12 10v5M12 17.500h.01",
  x: "M6 6l12 12M18 6 6 18",
};

/** An icon for the eyes alone; the control it stands in has a name of its own. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/**
 * An element. Keys of `attributes` that begin with `on` are listeners; `class`, `dataset` and true or false are
 * understood; null leaves an attribute out.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A button with an icon; without `text` the label is read aloud and shown as a tooltip. */
export function button(iconName, label, onclick, { text = null, kind = "quiet", ...attributes } = {}) {
  return h(
    "button",
    {
      type: "button",
      class: `button ${kind}${text === null ? " only-icon" : ""}`,
      "aria-label": text === label ? null : label,
      title: text === label ? null : label,
      onclick,
      ...attributes,
    },
    iconName && icon(iconName),
    text !== null && h("span", {}, text),
  );
}

export const byId = (id) => document.getElementById(id);

let announcing = 0;

/** Says it to screen readers, politely. The same sentence twice is said twice. */
export function announce(text) {
  const region = byId("announcer");
  region.textContent = "";
  clearTimeout(announcing);
  announcing = setTimeout(() => (region.textContent = text), 50);
}

let toasting = 0;

/** A short note at the edge of the window, which goes by itself. */
export function toast(text) {
  const note = byId("toast");
  note.textContent = text;
  note.hidden = false;
  announce(text);
  clearTimeout(toasting);
  toasting = setTimeout(() => (note.hidden = true), 3500);
}

/** Opens a <dialog> and resolves with its return value when it closes; focus goes back to where it was. */
export function ask(dialog) {
  const before = document.activeElement;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        if (before?.isConnected) before.focus();
        resolve(dialog.returnValue);
      },
      { once: true },
    );
  });
}

/** Whether the user is to be asked less of than usual: no autoplay, no movement. */
export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
