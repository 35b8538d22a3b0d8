// Running generations: sent, followed live where the server can, else by asking, and cancelled.

import { ApiError, blobOf, eventsOf, getJson, pause, request } from "./api.js";
import { toJson } from "./format.js";
import { CALLS } from "./schema.js";

const POLL_MS = 700;
const PREVIEWS = 3;
// A browser opens six connections to a server; one must be left for everything else.
const MAX_VIDEO_STREAMS = 2;
const MAX_IMAGE_STREAMS = 3;

/** What the server can do, found out by trying. */
const offers = { imageStream: true, videoEvents: true };
let videoStreams = 0;
let imageStreams = 0;
const waitingForStream = [];

/** Runs `work` once there is a stream for an image. */
async function withStream(work) {
  if (imageStreams < MAX_IMAGE_STREAMS) imageStreams += 1;
  else await new Promise((go) => waitingForStream.push(go)); // whoever ends hands its own on
  try {
    return await work();
  } finally {
    const next = waitingForStream.shift();
    if (next) next();
    else imageStreams -= 1;
  }
}

/** One generation. Fires `change` when what it shows changes; `state` ends as done, failed or cancelled. */
export class Job extends EventTarget {
  constructor(settings) {
    super();
    this.id = crypto.randomUUID();
    this.kind = settings.kind;
    this.settings = settings;
    this.created = Date.now();
    this.state = "sending";
    this.fraction = null;
    this.step = null;
    this.total = settings.total;
    this.eta = null;
    this.position = null;
    this.preview = null;
    this.error = null;
    this.results = [];
    this.videoId = null;
    this._controller = new AbortController();
  }

  get signal() {
    return this._controller.signal;
  }

  get running() {
    return ["sending", "queued", "running"].includes(this.state);
  }

  update(changes) {
    Object.assign(this, changes);
    this.dispatchEvent(new Event("change"));
  }

  showPreview(blob) {
    this._dropPreview();
    this.update({ preview: URL.createObjectURL(blob) });
  }

  /** Ends it here and on the server. */
  async cancel() {
    if (!this.running) return;
    this.end({ state: "cancelled" });
    if (this.videoId !== null) await request(`v1/videos/${this.videoId}`, { method: "DELETE" }).catch(() => {});
  }

  end(changes) {
    this._controller.abort();
    this.update(changes);
    setTimeout(() => this._dropPreview(), 1000); // the picture may be on the page until the next frame
  }

  _dropPreview() {
    if (this.preview !== null) URL.revokeObjectURL(this.preview);
    this.preview = null;
  }
}

/**
 * Runs a job to its end, or follows the video `existing` to its. `finished(job, found)` makes the job's results of what
 * came out: images, or a video as the server describes it.
 */
export async function run(job, finished, existing = null) {
  try {
    const made = existing !== null ? follow(job, existing) : job.kind === "image" ? images(job) : video(job);
    const found = await made;
    if (!job.running) return;
    job.results = await finished(job, found);
    job.end({ state: "done", fraction: 1 });
  } catch (error) {
    if (!job.running) return; // it was cancelled
    if (!(error instanceof ApiError)) console.error(error);
    const told = error instanceof ApiError ? error : new ApiError(String(error.message ?? error));
    job.end({ state: "failed", error: told });
  }
}

/** The body of a call, and its path: multipart when there are files. */
export function callOf(settings, extra = {}) {
  const call = CALLS[settings.kind];
  const params = { ...settings.params, ...extra };
  const files = Object.entries(settings.files).filter(([, list]) => list.length > 0);
  if (files.length === 0) {
    return { path: call.path, body: toJson(params), headers: { "Content-Type": "application/json" } };
  }
  const body = new FormData();
  for (const [name, value] of Object.entries(params)) {
    const several = Array.isArray(value);
    for (const each of several ? value : [value]) {
      body.append(several ? `${name}[]` : name, typeof each === "object" ? JSON.stringify(each) : String(each));
    }
  }
  for (const [name, list] of files) {
    for (const file of list) body.append(list.length > 1 ? `${name}[]` : name, file, file.name);
  }
  return { path: call.editPath ?? call.path, body, headers: {} };
}

const send = (job, extra) => {
  const { path, ...call } = callOf(job.settings, extra);
  return request(path.slice(1), { method: "POST", ...call, signal: job.signal });
};

// --- images ---

/** [{blob, seed, notes, seconds}] */
async function images(job) {
  if (offers.imageStream) {
    try {
      return await streamedImages(job);
    } catch (error) {
      if (!["stream", "partial_images"].includes(error.param)) throw error;
      offers.imageStream = false;
    }
  }
  job.update({ state: "running" });
  return wholeImages(job, await (await send(job)).json());
}

function wholeImages(job, reply) {
  const type = `image/${reply.output_format ?? "png"}`;
  return reply.data.map((image, index) => ({
    blob: blobOf(image.b64_json, type),
    seed: seedOf(job.settings, index, image.seed),
    notes: image.notes ?? [],
    seconds: image.generation_time ?? reply.inference_time_s ?? null,
  }));
}

/** One stream for each image, since a stream tells of one: output i has the seed + i, as in a call for all of them. */
async function streamedImages(job) {
  const { seed, n = 1 } = job.settings.params;
  const count = Array.isArray(seed) ? Math.max(seed.length, 1) : Number(n);
  const unknown = { state: "sending", position: null, fraction: 0, eta: null, step: 0, total: null };
  const parts = Array.from({ length: count }, () => ({ ...unknown }));
  const one = (part, index) => {
    const own = seed === undefined ? {} : { seed: seedOf(job.settings, index, null) };
    const wish = { stream: true, partial_images: PREVIEWS, ...(count > 1 ? { n: 1, ...own } : {}) };
    const tell = (changes, preview) => {
      Object.assign(part, changes);
      showParts(job, parts);
      // Of several the first that is not done.
      if (preview && parts.find((each) => each.state !== "done") === part) job.showPreview(preview);
    };
    return withStream(async () => {
      if (!job.running || !offers.imageStream) return null; // another one has failed, and with it all
      return streamedImage(job, await send(job, wish), index, tell);
    });
  };
  return Promise.all(parts.map(one));
}

/** What all parts come to. */
function showParts(job, parts) {
  const sum = (name) => parts.reduce((all, part) => all + part[name], 0);
  const begun = parts.filter((part) => part.state === "running" || part.state === "done");
  const waiting = parts.find((part) => part.state === "queued");
  const open = parts.filter((part) => part.state !== "done");
  const known = open.every((part) => part.eta !== null);
  const counted = parts.every((part) => part.total !== null);
  job.update({
    state: begun.length > 0 ? "running" : waiting ? "queued" : "sending",
    fraction: begun.length > 0 ? sum("fraction") / parts.length : null,
    eta: known && open.length > 0 ? Math.max(...open.map((part) => part.eta)) : null,
    step: counted ? sum("step") : null,
    total: counted ? sum("total") : job.settings.total,
    position: waiting?.position ?? null,
  });
}

/** The image of one stream, whose events and comments `tell` hears of. */
async function streamedImage(job, response, index, tell) {
  if (!response.headers.get("content-type")?.includes("event-stream")) {
    return wholeImages(job, await response.json())[0];
  }
  let found = null;
  for await (const event of eventsOf(response)) {
    const type = `image/${event.output_format ?? "png"}`;
    if (event.type?.endsWith(".completed")) {
      const seconds = event.generation_time ?? (Date.now() - job.created) / 1000;
      const seed = seedOf(job.settings, index, event.seed);
      found = { blob: blobOf(event.b64_json, type), seed, notes: event.notes ?? [], seconds };
      tell({ state: "done", fraction: 1, eta: null });
    } else if (event.type?.endsWith(".partial_image")) {
      tell({ state: "running", ...stepsOf(event) }, blobOf(event.b64_json, type));
    } else if (event.status) {
      const state = event.status === "queued" ? "queued" : "running";
      tell({ state, position: event.queue_position ?? null, ...stepsOf(event) });
    }
  }
  if (found === null) throw new ApiError("The connection to the server was lost.");
  return found;
}

/** What an event tells of progress, as far as it does. */
function stepsOf({ step, total_steps: total, progress, eta_seconds: eta }) {
  const counted = typeof step === "number" && typeof total === "number";
  const fraction = typeof progress === "number" ? progress / 100 : counted ? step / total : null;
  return {
    ...(counted ? { step, total } : {}),
    ...(fraction === null ? {} : { fraction }),
    ...(eta === undefined ? {} : { eta }),
  };
}

/** Output i has the request's seed + i; the server's reply may have lost digits of a large one. */
function seedOf(settings, index, reported) {
  const { seed } = settings.params;
  if (Array.isArray(seed)) return seed[index] ?? reported;
  if (typeof seed !== "number" && typeof seed !== "bigint") return reported ?? null;
  const sum = BigInt(seed) + BigInt(index);
  return sum <= Number.MAX_SAFE_INTEGER ? Number(sum) : sum;
}

// --- videos ---

/** The finished video as the server describes it. */
async function video(job) {
  const created = await (await send(job)).json();
  job.videoId = created.id;
  if (!job.running) {
    await request(`v1/videos/${created.id}`, { method: "DELETE" }).catch(() => {}); // cancelled while it was sent
    return null;
  }
  job.dispatchEvent(new Event("created"));
  return follow(job, created);
}

/** Follows a video that exists to its end. Throws ApiError when it fails. */
async function follow(job, first) {
  job.videoId = first.id;
  let now = apply(job, first);
  if (!isFinal(now) && offers.videoEvents && videoStreams < MAX_VIDEO_STREAMS) now = (await streamed(job, now)) ?? now;
  while (!isFinal(now)) {
    await pause(POLL_MS, job.signal);
    now = apply(job, await retrieved(job, now));
  }
  if (now.status === "completed") return now;
  throw new ApiError(now.error?.message ?? "The video failed.", { status: 500, ...now.error });
}

const isFinal = (video) => video.status === "completed" || video.status === "failed";

async function retrieved(job, before) {
  try {
    return await getJson(`v1/videos/${job.videoId}`, { signal: job.signal });
  } catch (error) {
    if (error.status === 404) throw new ApiError("The video was deleted.", { status: 404, code: error.code });
    if (error.unreachable || error.status >= 500) return before; // the page says so; go on asking
    throw error;
  }
}

/** The last state that the events told; null when there are none. What is still missing then is asked for. */
async function streamed(job, before) {
  let now = null;
  videoStreams += 1;
  try {
    const response = await request(`v1/videos/${job.videoId}/events`, { signal: job.signal });
    for await (const event of eventsOf(response)) {
      if (event.video) now = apply(job, event.video);
      progressOf(job, event);
      if (event.type === "video.preview") job.showPreview(blobOf(event.b64_json, event.media_type));
      if (now !== null && isFinal(now)) return now;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error.status === 404 || error.status === 405) offers.videoEvents = false;
  } finally {
    videoStreams -= 1;
  }
  return now ?? before;
}

function apply(job, video) {
  const total = job.total ?? video.parameters?.num_inference_steps ?? null;
  const counted = total !== null && video.status !== "queued";
  job.update({
    state: video.status === "queued" ? "queued" : "running",
    fraction: video.progress / 100,
    eta: video.eta_seconds ?? null,
    position: video.queue_position ?? null,
    step: counted ? Math.max(job.step ?? 0, Math.floor((video.progress / 100) * total)) : null,
    total,
  });
  return video;
}

/** Steps, where an event tells them. */
function progressOf(job, event) {
  if (typeof event.step !== "number" || typeof event.total_steps !== "number") return;
  job.update({ step: event.step, total: event.total_steps });
}
