// Two results side by side: media together, and a table of what differs.

import { ask, byId, button, calm, h, icon } from "./dom.js";
import { factsOf, mediaElement } from "./items.js";
import { labelFor } from "./schema.js";

/** Opens the dialog; videos play in step. */
export async function compare(items) {
  const dialog = byId("compare-dialog");
  const media = await Promise.all(items.map((item) => mediaElement(item)));
  const videos = media.filter((element) => element.tagName === "VIDEO");
  const settings = await Promise.all(items.map((item) => item.settings()));
  dialog.replaceChildren(
    h("div", { class: "dialog-head" },
      h("h2", { id: "compare-title" }, "Compare"),
      videos.length > 0 && playBoth(videos),
      button("x", "Close", () => dialog.close(), { kind: "quiet close" })),
    h("div", { class: "pair" }, items.map((item, index) => h("figure", { class: "side" },
      h("div", { class: "side-media" }, media[index]),
      h("figcaption", {}, h("span", { class: "side-name" }, "AB"[index]), item.prompt)))),
    differences(items, settings),
  );
  await ask(dialog);
  for (const video of videos) video.pause();
  dialog.replaceChildren();
}

/** One button and one position for both. */
function playBoth(videos) {
  const what = videos.length > 1 ? " both" : "";
  const toggle = button("play", "", () => (videos[0].paused ? play() : pause()), { text: "", kind: "plain" });
  const show = () => {
    const [name, verb] = videos[0].paused ? ["play", "Play"] : ["pause", "Pause"];
    toggle.replaceChildren(icon(name), h("span", {}, `${verb}${what}`));
  };
  const play = () => {
    for (const video of videos) video.currentTime = videos[0].currentTime % (video.duration || 1);
    for (const video of videos) video.play().catch(() => {});
  };
  const pause = () => videos.forEach((video) => video.pause());
  videos[0].addEventListener("play", show);
  videos[0].addEventListener("pause", show);
  show();
  const ready = (video) => new Promise((done) => video.addEventListener("canplay", done, { once: true }));
  if (!calm()) Promise.all(videos.map(ready)).then(play);
  return toggle;
}

function differences(items, settings) {
  const columns = items.map((item, index) => {
    return { ...named(settings[index].params), ...Object.fromEntries(factsOf(item)) };
  });
  const names = [...new Set(columns.flatMap((column) => Object.keys(column)))];
  const shown = (value) => (value === undefined || value === "" ? "–" : String(value));
  const rows = names.map((name) => ({ name, values: columns.map((column) => shown(column[name])) }));
  const differing = rows.filter(({ values }) => values[0] !== values[1]);
  const equal = rows.filter(({ values }) => values[0] === values[1]);
  const row = ({ name, values }, differs) =>
    h(
      "tr",
      { class: differs ? "differs" : "" },
      h("th", { scope: "row" }, name),
      values.map((value) => h("td", {}, value)),
    );
  const counted = differing.length === 1 ? "1 difference" : `${differing.length} differences`;
  return h(
    "div",
    { class: "differences" },
    h(
      "table",
      {},
      h("caption", {}, differing.length === 0 ? "Made with the same settings" : counted),
      h("thead", {}, h("tr", {}, ["Setting", "A", "B"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, differing.map((each) => row(each, true)), equal.map((each) => row(each, false))),
    ),
  );
}

/** Parameters under the names that the form gives them; those that facts tell are left to them. */
function named(params) {
  const { size, seed, ...rest } = params;
  return Object.fromEntries(Object.entries(rest).map(([name, value]) => [labelFor(name), value]));
}
