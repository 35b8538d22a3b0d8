// Numbers, times and names as people read them.

/** 75 -> "1 min 15 s"; below ten seconds with one decimal. */
export function duration(seconds) {
  if (seconds < 9.95) return `${Math.max(0, seconds).toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** A moment: the time of day, with the date when it was not today. */
export function moment(milliseconds) {
  const date = new Date(milliseconds);
  const time = { hour: "2-digit", minute: "2-digit" };
  const today = date.toDateString() === new Date().toDateString();
  return date.toLocaleString(undefined, today ? time : { ...time, day: "numeric", month: "short" });
}

/** At most six significant digits, no exponent, no trailing zeros. */
export const plain = (number) => String(Number(Number(number).toPrecision(6)));

const ACRONYMS = new Set(["cfg", "vae", "fps", "id", "url", "lora"]);

/** "num_inference_steps" -> "Inference steps", "cfg_interval_end" -> "CFG interval end". */
export function labelOf(name) {
  const words = name.replace(/^num_/, "").split("_").filter(Boolean);
  const shown = words.map((word) => (ACRONYMS.has(word) ? word.toUpperCase() : word)).join(" ");
  return shown.charAt(0).toUpperCase() + shown.slice(1);
}

/** A file name of a prompt: its first words in ASCII. */
export function slug(text) {
  const ascii = text.normalize("NFKD").toLowerCase().replace(/[^a-z0-9]+/g, "-");
  return ascii.replace(/^-+|-+$/g, "").slice(0, 40).replace(/-+$/, "") || "result";
}

/** JSON with whole numbers of any size: seeds reach 2^63 - 1, which a double cannot hold. */
export function toJson(values) {
  const fields = Object.entries(values).map(([name, value]) => `${JSON.stringify(name)}: ${jsonValue(value)}`);
  return `{${fields.join(", ")}}`;
}

function jsonValue(value) {
  if (typeof value === "bigint") return String(value);
  if (Array.isArray(value)) return `[${value.map(jsonValue).join(", ")}]`;
  return JSON.stringify(value);
}

/** The number that a text spells; whole ones of any size. Null when it spells none. */
export function numberOf(text) {
  const trimmed = text.trim();
  if (/^[+-]?[0-9]+$/.test(trimmed)) {
    const number = Number(trimmed);
    return Number.isSafeInteger(number) ? number : BigInt(trimmed);
  }
  return trimmed !== "" && Number.isFinite(Number(trimmed)) ? Number(trimmed) : null;
}

/** The ending of a media type's files. */
export function endingOf(mediaType) {
  const ending = mediaType.split(";")[0].split("/")[1] ?? "bin";
  return { jpeg: "jpg", quicktime: "mov" }[ending] ?? ending;
}

/** How bytes are written on a page. */
export function fileSize(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
