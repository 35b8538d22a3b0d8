// The page: what belongs together is put together here.

import { apiKey, getJson, health, onKeyNeeded, pause, setApiKey } from "./api.js";
import { showCode } from "./code.js";
import { compare } from "./compare.js";
import { ask, byId, button, icon, toast } from "./dom.js";
import { plain } from "./format.js";
import { SettingsForm } from "./form.js";
import { Gallery } from "./gallery.js";
import { VideoItem, keepImages } from "./items.js";
import { Job, run } from "./jobs.js";
import { progressText } from "./progress.js";
import { modesOf } from "./schema.js";
import { Stage } from "./stage.js";
import * as store from "./store.js";

const READY_POLL_MS = 15_000;
const WAITING_POLL_MS = 1000;

const jobs = new Set();
const form = new SettingsForm({ changed: () => hideError() });
const stage = new Stage({
  use: useSettings,
  remove: removeItem,
  compare: pickForComparison,
  askKey: () => askKey(true),
});
const gallery = new Gallery({ open: openItem, openJob, follow: followVideo, chosen: openComparison });

// --- generating ---

function generate() {
  if (byId("generate").disabled) return;
  hideError();
  form.clearProblems();
  const settings = form.settings();
  const shown = { item: stage.item };
  const job = new Job(settings);
  start(job);
  stage.showJob(job);
  byId("stage").scrollIntoView({ block: "nearest" });
  job.addEventListener("created", () => store.keepSettings(job.videoId, settings).catch(() => {}));
  run(job, finished).then(() => {
    if (job.state === "failed") showFailure(job, shown.item);
  });
}

function start(job) {
  jobs.add(job);
  gallery.addJob(job);
  job.addEventListener("change", () => {
    if (!job.running) jobs.delete(job);
    showTitle();
  });
}

/** What came out, as items of the gallery. */
async function finished(job, found) {
  const items = job.kind === "image" ? await keepImages(job, found) : [new VideoItem(found)];
  for (const item of items) gallery.add(item);
  return items;
}

/** The server's sentence: at the field that it is about, else beside the button. */
async function showFailure(job, before) {
  const atField = form.fail(job.error);
  byId("form-error").textContent = job.error.message;
  byId("form-error").classList.toggle("at-field", atField);
  byId("form-error").hidden = false;
  if (!atField || stage.job !== job) return;
  if (before) await stage.showItem(before);
  else stage.showEmpty();
}

function hideError() {
  byId("form-error").hidden = true;
}

/** A video of the list that is still being made. */
async function followVideo(video) {
  const item = new VideoItem(video);
  const job = new Job(await item.settings());
  Object.assign(job, { videoId: video.id, created: item.created, state: "queued" });
  start(job);
  await run(job, finished, video);
}

function showTitle() {
  const job = [...jobs].at(-1);
  document.title = job ? `${progressText(job)} – Studio` : "Studio";
}

// --- looking at results ---

function openItem(item) {
  stage.showItem(item);
  byId("stage").scrollIntoView({ block: "nearest" });
  byId("stage").focus({ preventScroll: true });
}

function openJob(job) {
  stage.showJob(job);
  byId("stage").scrollIntoView({ block: "nearest" });
}

async function removeItem(item) {
  if (await gallery.remove(item)) stage.gone(item);
}

function pickForComparison(item) {
  if (!gallery.isPicked(item)) gallery.toggle(item);
}

function openComparison(items) {
  compare(items).catch((error) => toast(error.message));
}

function useSettings(settings) {
  if (!form.ready) return;
  form.use(settings);
  byId("form").scrollIntoView({ block: "start" });
  form.fields.get("prompt")?.control.focus();
  toast("Settings taken over");
}

// --- the key ---

async function askKey(rejected) {
  const dialog = byId("key-dialog");
  byId("key-text").textContent = rejected ? "The server did not accept this key." : "This server asks for a key.";
  byId("key-input").value = "";
  if ((await ask(dialog)) !== "given") return false;
  setApiKey(byId("key-input").value.trim());
  form.ready && form.keyChanged();
  return true;
}

function wireKey() {
  onKeyNeeded(askKey);
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    byId("key-dialog").close("given");
  });
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
}

async function changeKey() {
  const known = apiKey() !== null;
  byId("key-text").textContent = known
    ? "Leave it empty to forget the key."
    : "Only servers that were started with a key need one.";
  byId("key-input").value = "";
  if ((await ask(byId("key-dialog"))) !== "given") return;
  setApiKey(byId("key-input").value.trim());
  if (form.ready) form.keyChanged();
  toast(apiKey() === null ? "Key forgotten" : "Key set");
}

// --- the server's state ---

/** Describes the form once the model is there, and says when the server is not. Never ends. */
async function watch() {
  let described = false;
  for (;;) {
    const { state, error } = await health();
    const ready = state === "ready";
    showState(state, error);
    if (ready && !described) {
      try {
        await describe();
        described = true;
      } catch (problem) {
        showState(problem.status === 401 ? "locked" : "starting", null);
      }
    }
    byId("generate").disabled = !(described && (ready || state === "recovering"));
    await pause(ready && described ? READY_POLL_MS : WAITING_POLL_MS);
  }
}

function showState(state, error) {
  const texts = {
    ready: null,
    recovering: "The model is being loaded again after a failure. What you send now waits for it.",
    failed: error?.message ?? "The engine has failed; the server's log says why.",
    stopping: "The server is shutting down.",
    unreachable: "The server cannot be reached. Trying again…",
    locked: "This server needs an API key.",
  };
  const text = state in texts ? texts[state] : "The model is loading. This page is ready as soon as it is.";
  const banner = byId("banner");
  if (banner.dataset.state === state) return;
  banner.dataset.state = state;
  banner.hidden = text === null;
  banner.replaceChildren(...(text === null ? [] : [text]));
  if (state === "locked") {
    const label = "Enter an API key";
    banner.append(button("key", label, () => askKey(false), { text: label, kind: "plain small" }));
  }
  byId("model").dataset.state = state in texts ? state : "starting";
  if (text !== null && !form.ready) byId("model-name").textContent = state in texts ? "Not available" : "Loading…";
}

async function describe() {
  const [page, models] = await Promise.all([getJson("openapi.json"), getJson("v1/models")]);
  const model = models.data[0];
  const modes = modesOf(model);
  form.describe(page, model, modes);
  byId("form-skeleton").hidden = true;
  byId("advanced").hidden = false;
  byId("mode").hidden = modes.length < 2;
  const millions = model.num_parameters / 1e6;
  const size = millions >= 1000 ? `${plain((millions / 1000).toFixed(1))} B` : `${plain(millions.toFixed(0))} M`;
  const about = [model.pipeline_class, `${size} parameters`, model.precision, model.licence];
  byId("model-name").textContent = model.id;
  byId("model").title = about.filter(Boolean).join(" · ");
  await gallery.load();
}

// --- the rest of the page ---

function wireTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const toggle = button("moon", "Dark", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    localStorage.setItem("studio.theme", root.dataset.theme);
    show();
  }, { id: "theme" });
  const show = () => {
    const label = dark() ? "Switch to the light theme" : "Switch to the dark theme";
    toggle.setAttribute("aria-label", label);
    toggle.title = label;
    toggle.replaceChildren(icon(dark() ? "sun" : "moon"));
  };
  system.addEventListener("change", show);
  show();
  byId("top-tools").append(button("key", "API key", changeKey, { id: "key" }), toggle);
}

function wireKeyboard() {
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate();
    } else if (event.key === "Escape") {
      const job = stage.job?.running ? stage.job : [...jobs].at(-1);
      job?.cancel();
    }
  });
}

function wireForm() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  // Enter in a field is no wish to start: Ctrl+Enter is.
  byId("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.tagName === "INPUT") event.preventDefault();
  });
  for (const radio of document.querySelectorAll('input[name="mode"]')) {
    radio.addEventListener("change", () => form.setMode(radio.value));
  }
  const show = () => form.ready && showCode(form.settings());
  byId("foot-tools").append(button("code", "Show as code", show, { kind: "plain" }));
}

wireKey();
wireTheme();
wireKeyboard();
wireForm();
stage.showEmpty();
watch();
