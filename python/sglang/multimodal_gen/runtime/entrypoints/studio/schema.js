// From the server's own description to the fields of the form. Parameters that are not named here appear by themselves.

import { labelOf, plain } from "./format.js";

export const CALLS = {
  image: { path: "/v1/images/generations", editPath: "/v1/images/edits" },
  video: { path: "/v1/videos" },
};

// Shown first, in this order; everything else is advanced.
const BASIC = [
  ...["width", "height", "num_frames", "fps"],
  ...["num_inference_steps", "guidance_scale", "strength", "n", "seed"],
];
const IN_PLACE = ["prompt", "negative_prompt"];
// What the page decides, what says the same as another field, and OpenAI's fields that make no difference here.
const NOT_SHOWN = new Set([
  ...["model", "size", "seconds", "num_outputs_per_prompt", "response_format", "stream", "partial_images"],
  ...["background", "quality", "moderation", "input_fidelity", "user", "safety_identifier"],
]);
const LABELS = {
  prompt: "Prompt", negative_prompt: "Negative prompt", num_frames: "Frames", fps: "Frames per second",
  num_inference_steps: "Steps", guidance_scale: "Guidance", n: "Number of images", seed: "Seed",
  output_format: "File format", output_quality: "File quality", strength: "Change",
};
const GROUPS = {
  prompt: "Text", size: "Size", denoising: "Denoising", inputs: "Input", output: "File", execution: "Execution",
  cache: "Step caches", observation: "For administrators", fallback: "Library", some: "Only some models take these",
};
const LARGE = 1e6; // no slider can reach every value of a wider range

/** Names that an error may carry for what the form calls otherwise. */
export const FIELD_OF_PARAM = {
  size: "width", seconds: "num_frames", num_outputs_per_prompt: "n", images: "image",
};

/** What the served model makes, from its tasks: a list of `image` and `video`. */
export function modesOf(model) {
  const tasks = model.tasks ?? [];
  const modes = [];
  if (tasks.some((task) => /video$|V$/.test(task))) modes.push("video");
  if (tasks.some((task) => /image$|I$/.test(task))) modes.push("image");
  return modes.length > 0 ? modes : ["image", "video"];
}

/** The schema's properties of a call, as JSON or as multipart, without other spellings of the same. */
function propertiesOf(page, path, mediaType) {
  const found = page.paths[path]?.post?.requestBody?.content?.[mediaType]?.schema?.properties ?? {};
  return Object.fromEntries(Object.entries(found).filter(([, schema]) => !schema["x-spelling"]));
}

/** Everything that the form of one mode is made of: `fields`, in order, and `inputs`, the files. */
export function formOf(page, model, mode) {
  const call = CALLS[mode];
  const inputsPath = call.editPath ?? call.path;
  const properties = propertiesOf(page, call.path, "application/json");
  const files = propertiesOf(page, inputsPath, "multipart/form-data");
  // `strength` and its like may stand only in the call that takes files.
  const all = { ...properties, ...propertiesOf(page, inputsPath, "application/json") };
  const isFile = (name) => JSON.stringify(files[name] ?? "").includes('"binary"');
  const fields = Object.entries(all)
    .filter(([name]) => !isFile(name) && !NOT_SHOWN.has(name))
    .map(([name, schema]) => fieldOf(name, schema, model))
    .filter((field) => field !== null);
  return { fields: ordered(fields), inputs: inputsOf(files, isFile, model, mode) };
}

function ordered(fields) {
  const place = (field) => {
    const index = [...IN_PLACE, ...BASIC].indexOf(field.name);
    return index < 0 ? Infinity : index;
  };
  return fields.toSorted((a, b) => (place(a) === place(b) ? 0 : place(a) - place(b)));
}

function fieldOf(name, schema, model) {
  const kinds = schema.anyOf ?? [schema];
  const list = kinds.find((kind) => kind.type === "array");
  const scalar = kinds.find((kind) => !["null", "array"].includes(kind.type)) ?? list?.items?.anyOf?.[0] ?? list?.items;
  const kind = kindOf(scalar);
  if (scalar?.enum?.length === 1) return null; // nothing to choose
  if (scalar?.type === "object" && scalar.properties) return null; // for programs
  const limits = model.limits ?? {};
  const field = {
    name,
    kind,
    list: list !== undefined,
    label: labelFor(name),
    help: schema.description ?? "",
    optional: kinds.some((each) => each.type === "null"),
    minimum: scalar?.minimum ?? null,
    maximum: scalar?.maximum ?? null,
    choices: scalar?.enum ?? null,
    maxLength: scalar?.maxLength ?? null,
    unset: schema["x-unset"] ?? "",
    initial: model.defaults?.[name] ?? schema.default ?? null,
    admin: schema["x-admin"] === true,
    basic: BASIC.includes(name),
    inPlace: IN_PLACE.includes(name),
    step: kind === "integer" ? 1 : null,
  };
  const some = schema["x-of-some-models"] === true && model.defaults?.[name] === undefined;
  field.group = some ? "some" : (schema["x-group"] ?? "other");
  return withLimits(field, limits);
}

/** The bounds of the served model where they are narrower than those of any. */
function withLimits(field, limits) {
  if (field.name === "num_frames") {
    field.maximum = Math.min(field.maximum ?? Infinity, limits.max_frames ?? Infinity);
    field.step = limits.frame_stride ?? 1;
  }
  if (field.name === "width" || field.name === "height") {
    field.step = limits.size_multiple ?? 1;
    field.minimum = Math.max(field.minimum ?? 1, field.step);
    field.maximum = Math.min(field.maximum ?? Infinity, limits.max_side ?? Infinity);
  }
  if (field.name === "max_sequence_length") {
    field.maximum = Math.min(field.maximum ?? Infinity, limits.max_sequence_length ?? Infinity);
  }
  return field;
}

function kindOf(scalar) {
  if (scalar?.enum) return "choice";
  return { integer: "integer", number: "number", boolean: "switch", string: "text" }[scalar?.type] ?? "json";
}

/** [low, high] of a slider; null where it is of no use: an open range, or values far apart without a default. */
export function sliderRange({ minimum, maximum, initial, step }) {
  if (minimum === null || maximum === null || !Number.isFinite(maximum)) return null;
  if (maximum - minimum <= 100) return [minimum, maximum];
  if (typeof initial !== "number" || initial <= 0) return null;
  const high = Math.min(maximum, Math.max(initial * 3, minimum + 10 * (step ?? 1)));
  return high - minimum > LARGE ? null : [minimum, high];
}

/** The step of a number's slider and arrows. */
export function stepOf({ kind, step, minimum, maximum, initial }) {
  if (step !== null) return step;
  const [low, high] = sliderRange({ minimum, maximum, initial, step }) ?? [0, 100];
  return kind === "integer" ? 1 : high - low <= 2 ? 0.01 : 0.1;
}

/** A parameter's name as the form shows it. */
export const labelFor = (name) => LABELS[name] ?? labelOf(name);

export const groupName = (group) => GROUPS[group] ?? labelOf(group);

/** The default as the form shows it, in place of a value. */
export function defaultOf(field) {
  if (field.initial !== null) return typeof field.initial === "number" ? plain(field.initial) : String(field.initial);
  return field.unset;
}

// --- files ---

const INPUT_LABELS = {
  image: "Image", mask: "Mask", input_reference: "Start image", last_image: "End image", video: "Video",
};

/** The files that this model takes in this mode: name, label, kind, how many, whether it must be there. */
function inputsOf(files, isFile, model, mode) {
  const taken = model.limits?.inputs;
  if (!taken) return [];
  const tasks = model.tasks ?? [];
  const animates = tasks.length === 0 || tasks.some((task) => /I.*2V$|image.*video$/.test(task));
  const images = mode === "image" || animates ? taken.max_images : 0;
  const one = (takes, requires) => (takes || requires ? 1 : 0);
  const last = { most: one(taken.takes_last_image, taken.requires_last_image), required: taken.requires_last_image };
  const rules = {
    image: { most: images, required: taken.min_images > 0, kind: "image", mask: taken.takes_mask },
    input_reference: { most: images, required: taken.min_images > 0, kind: "image" },
    last_image: { ...last, kind: "image" },
    video: { most: one(taken.takes_video, taken.requires_video), required: taken.requires_video, kind: "video" },
  };
  return Object.entries(files)
    .filter(([name]) => isFile(name) && name !== "mask")
    .map(([name, schema]) => ({
      name,
      label: INPUT_LABELS[name] ?? labelOf(name),
      help: schema.description ?? "",
      ...(rules[name] ?? { most: 1, required: false, kind: "image" }),
    }))
    .filter((input) => input.most > 0);
}
