// The gallery: running jobs, then results, newest first; pages of the server's videos are fetched as they are needed.

import { ask, byId, button, h, toast } from "./dom.js";
import { moment } from "./format.js";
import { ImageItem, VideoItem, download, thumbnailElement, videoPage } from "./items.js";
import { progressLine } from "./progress.js";
import * as store from "./store.js";

const PAGE = 24;

export class Gallery {
  /** `open(item)`, `openJob(job)`, `chosen([a, b])`: the user wishes it. `follow(video)`: one still runs. */
  constructor({ open, openJob, follow, chosen }) {
    this._open = open;
    this._openJob = openJob;
    this._follow = follow;
    this._chosen = chosen;
    this._items = new Map();
    this._jobs = new Map();
    this._elements = new Map();
    this._picked = [];
    this._shown = PAGE;
    this._filter = "all";
    this._after = null;
    this._moreVideos = true;
    this._loading = false;
    this._loaded = false;
    this._list = byId("gallery-list");
    this._more = byId("gallery-more");
    this._more.addEventListener("click", () => this.showMore());
    for (const radio of document.querySelectorAll('input[name="filter"]')) {
      radio.addEventListener("change", () => this._setFilter(radio.value));
    }
    byId("compare-go").addEventListener("click", () => this._chosen([...this._picked]));
    byId("compare-clear").addEventListener("click", () => this._pick(null));
    this._skeletons();
  }

  /** What this browser kept and the server's first page. */
  async load() {
    const kept = await store.images().catch(() => []);
    for (const record of kept) this._items.set(record.id, new ImageItem(record));
    await this._fill();
    this._loaded = true;
    this.render();
  }

  /** What is new comes before those of the same second: the server's times have no fractions. */
  add(item) {
    this._items = new Map([[item.key, item], ...this._items]);
    this.render();
  }

  addJob(job) {
    this._jobs.set(job.id, job);
    job.addEventListener("change", () => this._jobChanged(job));
    this.render();
  }

  knows(id) {
    return this._items.has(id) || [...this._jobs.values()].some((job) => job.videoId === id);
  }

  /** Deletes after asking. Returns whether it was. */
  async remove(item) {
    const dialog = byId("confirm-dialog");
    byId("confirm-text").textContent = item.kind === "video"
      ? "The video is deleted from the server, for everybody."
      : "The image is deleted from this browser.";
    if ((await ask(dialog)) !== "yes") return false;
    try {
      await item.remove();
    } catch (error) {
      toast(error.message);
      return false;
    }
    this._items.delete(item.key);
    this._picked = this._picked.filter((each) => each !== item);
    this.render();
    toast("Deleted");
    return true;
  }

  async showMore() {
    this._shown += PAGE;
    const before = this._list.children.length;
    await this._fill();
    this.render();
    this._list.children[before]?.querySelector("button")?.focus();
  }

  isPicked = (item) => this._picked.includes(item);
  toggle = (item) => this._pick(item);

  // --- loading ---

  /** Fetch pages until as many videos are here as could be shown. */
  async _fill() {
    this._loading = true;
    this._more.disabled = true;
    try {
      const videos = () => [...this._items.values()].filter((item) => item.kind === "video").length;
      while (this._moreVideos && videos() < this._shown) await this._nextPage();
    } catch (error) {
      if (!error.unreachable) toast(error.message);
    } finally {
      this._loading = false;
      this._more.disabled = false;
    }
  }

  async _nextPage() {
    const page = await videoPage(this._after, PAGE);
    for (const video of page.data) {
      if (this.knows(video.id)) continue;
      if (video.status === "completed" || video.status === "failed") this._items.set(video.id, new VideoItem(video));
      else this._follow(video);
    }
    this._after = page.last_id ?? this._after;
    this._moreVideos = page.has_more === true && page.last_id !== null;
  }

  // --- showing ---

  _setFilter(filter) {
    this._filter = filter;
    this.render();
  }

  _visible() {
    const wanted = (each) => this._filter === "all" || each.kind === this._filter;
    const jobs = [...this._jobs.values()].filter((job) => job.running && wanted(job)).reverse();
    const items = [...this._items.values()].filter(wanted).toSorted((a, b) => b.created - a.created);
    return { jobs, items: items.slice(0, this._shown), rest: items.length > this._shown };
  }

  /** Brings the list up to date; elements that stay are left alone, so that focus and scrolling are too. */
  render() {
    const { jobs, items, rest } = this._visible();
    const wanted = [
      ...jobs.map((job) => this._elementOf(job.id, () => this._jobCard(job))),
      ...items.map((item) => this._elementOf(item.key, () => this._card(item))),
    ];
    for (const skeleton of [...this._list.querySelectorAll(".placeholder")]) skeleton.remove();
    wanted.forEach((element, index) => {
      if (this._list.children[index] !== element) this._list.insertBefore(element, this._list.children[index] ?? null);
    });
    while (this._list.children.length > wanted.length) this._list.lastElementChild.remove();
    if (!this._loaded && wanted.length === 0) this._skeletons();
    byId("gallery-empty").hidden = !this._loaded || wanted.length > 0;
    this._more.hidden = !rest && !this._moreVideos;
    byId("gallery-count").textContent = items.length > 0 ? `${items.length}${this._more.hidden ? "" : "+"}` : "";
    this._showPicked();
  }

  _skeletons() {
    const shape = (name) => h("div", { class: `${name} skeleton` });
    const card = () => h("li", { class: "card placeholder", "aria-hidden": "true" }, shape("thumb"), shape("line"));
    this._list.replaceChildren(...Array.from({ length: 4 }, card));
  }

  _elementOf(key, make) {
    if (!this._elements.has(key)) this._elements.set(key, make());
    return this._elements.get(key);
  }

  _card(item) {
    const what = `${item.kind === "video" ? "Video" : "Image"}: ${item.prompt || "no prompt"}`;
    const tool = { kind: "float", disabled: Boolean(item.failed) };
    const pick = { kind: "float pick", "aria-pressed": "false" };
    const save = () => download(item).catch((error) => toast(error.message));
    const made = h("time", { datetime: new Date(item.created).toISOString() }, moment(item.created));
    return h(
      "li",
      { class: "card", dataset: { key: item.key, kind: item.kind } },
      h("button", { type: "button", class: "card-open", "aria-label": `Show ${what}`, onclick: () => this._open(item) },
        thumbnailElement(item),
        item.length && h("span", { class: "badge" }, item.length)),
      h("div", { class: "card-tools" },
        button("compare", `Compare ${what}`, () => this._pick(item), { ...tool, ...pick }),
        button("download", `Download ${what}`, save, tool),
        button("trash", `Delete ${what}`, () => this.remove(item), { kind: "float" })),
      h("p", { class: "card-prompt", title: item.prompt }, item.prompt || "No prompt"),
      h("p", { class: "card-facts" }, item.failed ? "Failed" : item.size.replace("x", " × "), " · ", made),
    );
  }

  _jobCard(job) {
    const line = progressLine(job);
    const label = `Show the running ${job.kind}: ${job.settings.params.prompt}`;
    const open = { type: "button", class: "card-open", "aria-label": label, onclick: () => this._openJob(job) };
    return h(
      "li",
      { class: "card running", dataset: { job: job.id } },
      h("button", open, h("div", { class: "thumb skeleton" })),
      h("div", { class: "card-tools" }, button("x", "Cancel", () => job.cancel(), { kind: "float" })),
      h("p", { class: "card-prompt" }, job.settings.params.prompt || "No prompt"),
      line.element,
    );
  }

  _jobChanged(job) {
    const element = this._elements.get(job.id);
    if (job.running && element) {
      const thumb = element.querySelector(".thumb");
      if (job.preview && thumb.firstElementChild?.src !== job.preview) {
        thumb.replaceChildren(h("img", { src: job.preview, alt: "" }));
        thumb.classList.remove("skeleton");
      }
      return;
    }
    this._jobs.delete(job.id);
    this._elements.delete(job.id);
    this.render();
  }

  // --- comparing ---

  _pick(item) {
    if (item === null) this._picked = [];
    else if (this.isPicked(item)) this._picked = this._picked.filter((each) => each !== item);
    else this._picked = [...this._picked, item].slice(-2);
    this._showPicked();
  }

  _showPicked() {
    const count = this._picked.length;
    byId("compare-tray").hidden = count === 0;
    byId("compare-text").textContent = count < 2 ? "Choose one more to compare" : "Two results chosen";
    byId("compare-go").disabled = count < 2;
    for (const [key, element] of this._elements) {
      const picked = this._picked.some((each) => each.key === key);
      element.classList.toggle("picked", picked);
      element.querySelector(".pick")?.setAttribute("aria-pressed", String(picked));
    }
  }
}
