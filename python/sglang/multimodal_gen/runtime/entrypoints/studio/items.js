// Results: images that this browser keeps and videos that the server keeps, behind one face.

import { getJson, request } from "./api.js";
import { h, icon } from "./dom.js";
import { duration, endingOf, slug } from "./format.js";
import * as store from "./store.js";

const MAX_HELD = 40; // media in memory at once; the server sends others again

/** What holds the bytes of media that were looked at lately, by key. */
const held = new Map();

async function urlOf(key, load) {
  let entry = held.get(key);
  held.delete(key);
  entry ??= load().then((blob) => ({ blob, url: URL.createObjectURL(blob) }));
  held.set(key, entry); // the newest last
  entry.catch(() => held.delete(key));
  for (const old of [...held.keys()].slice(0, Math.max(0, held.size - MAX_HELD))) release(old);
  return entry;
}

function release(key) {
  const entry = held.get(key);
  held.delete(key);
  // Elements that show it have decoded it by then; a video that still plays keeps its own hold of the bytes.
  entry?.then(({ url }) => setTimeout(() => URL.revokeObjectURL(url), 60_000)).catch(() => {});
}

/** An image of this browser. */
export class ImageItem {
  constructor(record) {
    this.kind = "image";
    this.record = record;
    this.key = record.id;
    this.created = record.created;
    this.prompt = record.settings.params.prompt;
    this.seed = record.seed;
    this.size = `${record.width}x${record.height}`;
    this.seconds = record.seconds;
    this.notes = record.notes ?? [];
    this.model = record.settings.model;
    this.length = null;
  }

  settings = async () => this.record.settings;
  media = () => urlOf(this.key, async () => this.record.blob);
  thumbnail = this.media;

  async remove() {
    await store.forgetImage(this.key);
    release(this.key);
  }
}

/** A video of the server, as it described it. */
export class VideoItem {
  constructor(video) {
    this.kind = "video";
    this.video = video;
    this.key = video.id;
    this.created = video.created_at * 1000;
    this.prompt = video.prompt ?? "";
    this.seed = video.seed ?? null;
    this.size = video.size;
    this.seconds = video.generation_time ?? null;
    this.notes = video.notes ?? [];
    this.model = video.model;
    this.length = video.num_frames > 1 ? `${video.seconds} s` : null;
    this.failed = video.status === "failed" ? (video.error?.message ?? "It failed.") : null;
  }

  /** What this browser knows of it, else as much as the server tells. */
  async settings() {
    const kept = await store.settingsOf(this.key).catch(() => null);
    if (kept !== null) return kept;
    const { prompt, seed, size, num_frames, fps, model, parameters } = this.video;
    const { width, height, ...recorded } = parameters ?? {}; // the size says them
    const told = Object.entries({ ...recorded, prompt: prompt ?? "", seed, size, num_frames, fps });
    const params = Object.fromEntries(told.filter(([, value]) => value !== null && value !== undefined));
    return { kind: "video", params, files: {}, model, total: recorded.num_inference_steps ?? null };
  }

  _content = (variant) => async () => (await request(`v1/videos/${this.key}/content${variant}`)).blob();
  media = () => urlOf(this.key, this._content(""));
  thumbnail = () => urlOf(`${this.key}.thumbnail`, this._content("?variant=thumbnail"));

  async remove() {
    await request(`v1/videos/${this.key}`, { method: "DELETE" }).catch((error) => {
      if (error.status !== 404) throw error;
    });
    await store.forgetSettings(this.key).catch(() => {});
    release(this.key);
    release(`${this.key}.thumbnail`);
  }
}

/** Keeps the finished images of a job; returns their items. */
export async function keepImages(job, images) {
  const items = [];
  for (const [index, image] of images.entries()) {
    const { n, ...params } = job.settings.params;
    const bitmap = await createImageBitmap(image.blob);
    const record = {
      id: `${job.id}-${index}`,
      created: Date.now() - index,
      settings: { ...job.settings, params: { ...params, seed: image.seed } },
      blob: image.blob,
      seed: image.seed,
      seconds: image.seconds,
      notes: image.notes,
      width: bitmap.width,
      height: bitmap.height,
    };
    bitmap.close();
    // Private windows may keep nothing; the image is shown all the same.
    await store.keepImage(record).catch((error) => console.warn("the image could not be kept", error));
    items.push(new ImageItem(record));
  }
  return items;
}

/** One page of the server's videos. */
export const videoPage = (after, limit) =>
  getJson(`v1/videos?limit=${limit}&order=desc${after === null ? "" : `&after=${encodeURIComponent(after)}`}`);

/** The element that shows the media, at full size. */
export async function mediaElement(item, { autoplay = false } = {}) {
  const { url, blob } = await item.media();
  if (blob.type.startsWith("video/")) {
    const name = `Video: ${item.prompt}`;
    const video = h("video", { src: url, controls: true, loop: true, playsinline: true, "aria-label": name });
    video.muted = true;
    video.autoplay = autoplay;
    return video;
  }
  return h("img", { src: url, alt: item.prompt });
}

/** The small picture of a card; a placeholder while it loads and when there is none. */
export function thumbnailElement(item) {
  const box = h("div", { class: "thumb skeleton" });
  const show = async () => {
    try {
      const { url } = await item.thumbnail();
      const image = h("img", { src: url, alt: "", decoding: "async" });
      await image.decode();
      box.replaceChildren(image);
    } catch {
      box.replaceChildren(icon(item.kind));
    }
    box.classList.remove("skeleton");
  };
  if (item.failed) {
    box.classList.remove("skeleton");
    box.append(icon("warning"));
  } else {
    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      show();
    }, { rootMargin: "200px" }).observe(box);
  }
  return box;
}

/** Saves the media as a file named after its prompt. */
export async function download(item) {
  const { url, blob } = await item.media();
  const name = item.seed === null ? slug(item.prompt) : `${slug(item.prompt)}-${item.seed}`;
  h("a", { href: url, download: `${name}.${endingOf(blob.type)}` }).click();
}

/** What is told of a result, as [name, value]. */
export function factsOf(item) {
  return [
    ["Size", item.size.replace("x", " × ")],
    ["Length", item.length],
    ["Seed", item.seed === null ? null : String(item.seed)],
    ["Time", item.seconds === null ? null : duration(item.seconds)],
    ["Model", item.model],
  ].filter(([, value]) => value !== null && value !== undefined);
}
