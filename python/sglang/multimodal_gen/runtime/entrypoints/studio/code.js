// The same request as a shell command and as a Python program. The key is never in it, only a variable's name.

import { ROOT, apiKey } from "./api.js";
import { ask, byId, button, h, toast } from "./dom.js";
import { toJson } from "./format.js";
import { CALLS } from "./schema.js";

const KEY_VARIABLE = "SGLANG_API_KEY";
// What OpenAI's client has arguments for; everything else goes into extra_body.
const CLIENT_ARGUMENTS = {
  image: ["prompt", "n", "size", "output_format", "output_compression"],
  video: ["prompt", "size"],
};

const url = (path) => new URL(path.slice(1), ROOT).href;
const shellQuoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

// --- the shell ---

/** A command that makes the result and saves it. */
export function curl(settings) {
  const call = CALLS[settings.kind];
  const hasFiles = Object.keys(settings.files).length > 0;
  const key = apiKey() === null ? [] : [`-H "Authorization: Bearer $${KEY_VARIABLE}"`];
  const address = url(hasFiles ? (call.editPath ?? call.path) : call.path);
  const data = hasFiles ? formParts(settings) : jsonParts(settings);
  const parts = [`curl --fail-with-body -sS ${address}`, ...key, ...data];
  const bare = `curl --fail-with-body -sS${key.length ? ` ${key[0]}` : ""}`;
  return settings.kind === "image" ? imageCommand(parts, settings) : videoCommand(parts, bare, settings);
}

const jsonParts = (settings) => ["-H 'Content-Type: application/json'", `-d ${shellQuoted(toJson(settings.params))}`];

function formParts({ params, files }) {
  const texts = Object.entries(params).flatMap(([name, value]) =>
    Array.isArray(value) ? value.map((each) => `${name}[]=${each}`) : [`${name}=${value}`],
  );
  const attached = attachments(files).map(([name, file]) => `-F ${shellQuoted(`${name}=@${nameOf(file)}`)}`);
  return [...texts.map((text) => `--form-string ${shellQuoted(text)}`), ...attached];
}

/** [name of the part, file] of each; several files of a field are sent as `name[]`. */
const attachments = (files) =>
  Object.entries(files).flatMap(([name, list]) => list.map((file) => [list.length > 1 ? `${name}[]` : name, file]));

/** A file name that needs no quoting inside curl's own syntax. */
const nameOf = (file) => (file.name || "image.png").replace(/[^\w.-]+/g, "_");

function imageCommand(parts, settings) {
  const ending = settings.params.output_format ?? "png";
  return `${parts.join(" \\\n  ")} \\\n  -o reply.json &&\npython3 -c 'import base64, json
for index, image in enumerate(json.load(open("reply.json"))["data"]):
    open(f"image-{index}.${ending}", "wb").write(base64.b64decode(image["b64_json"]))'`;
}

function videoCommand(parts, bare, settings) {
  const field = (name) => `python3 -c 'import json, sys; print(json.load(sys.stdin)["${name}"])'`;
  const videos = url("/v1/videos");
  return `id=$(${parts.join(" \\\n  ")} |
  ${field("id")})
while status=$(${bare} ${videos}/$id |
  ${field("status")}); [ "$status" = queued ] || [ "$status" = in_progress ]; do sleep 1; done
${bare} ${videos}/$id/content -o video.${settings.params.output_format ?? "mp4"}`;
}

// --- Python ---

/** A program with OpenAI's own client that makes the result and saves it. */
export function python(settings) {
  const known = CLIENT_ARGUMENTS[settings.kind];
  const entries = Object.entries(settings.params);
  const own = entries.filter(([name]) => known.includes(name)).map(([name, value]) => `${name}=${literal(value)}`);
  const extra = entries.filter(([name]) => !known.includes(name));
  const lines = extra.map(([name, value]) => `        ${literal(name)}: ${literal(value)},\n`);
  const more = extra.length > 0 ? [`extra_body={\n${lines.join("")}    }`] : [];
  return settings.kind === "image" ? imageProgram(settings, own, more) : videoProgram(settings, own, more, entries);
}

function client(imports) {
  const key = apiKey() === null ? '"unused"' : `os.environ["${KEY_VARIABLE}"]`;
  const modules = [...imports, ...(apiKey() === null ? [] : ["os"])].toSorted();
  return `${modules.map((name) => `import ${name}\n`).join("")}${modules.length ? "\n" : ""}import openai

client = openai.OpenAI(base_url=${literal(new URL("v1", ROOT).href)}, api_key=${key})
`;
}

const call = (name, parts) => `${name}(\n${parts.map((part) => `    ${part},\n`).join("")})\n`;
const opened = (file) => `open(${literal(nameOf(file))}, "rb")`;

function imageProgram(settings, own, more) {
  const { image, mask, ...others } = settings.files;
  const files = [];
  if (image) files.push(`image=${image.length === 1 ? opened(image[0]) : `[${image.map(opened).join(", ")}]`}`);
  if (mask) files.push(`mask=${opened(mask[0])}`);
  const method = image || Object.keys(others).length > 0 ? "edit" : "generate";
  return `${client(["base64"])}
reply = ${call(`client.images.${method}`, [...files, ...own, ...more])}
for index, image in enumerate(reply.data):
    with open(f"image-{index}.${settings.params.output_format ?? "png"}", "wb") as file:
        file.write(base64.b64decode(image.b64_json))
`;
}

function videoProgram(settings, own, more, entries) {
  const { input_reference: start, ...others } = settings.files;
  const started = start ? [`input_reference=${opened(start[0])}`] : [];
  const created = Object.keys(others).length > 0
    ? rawVideo(settings, entries)
    : `video = ${call("client.videos.create_and_poll", [...started, ...own, ...more])}`;
  return `${client([])}
${created}
if video.status != "completed":
    raise SystemExit(video.error.message)
client.videos.download_content(video.id).write_to_file("video.${settings.params.output_format ?? "mp4"}")
`;
}

/** The client has no argument for these files, but sends any form. */
function rawVideo(settings, entries) {
  const body = entries.map(([name, value]) => `    ${literal(name)}: ${literal(value)},\n`).join("");
  const line = ([name, file]) => `    (${literal(name)}, ${opened(file)}),\n`;
  const files = attachments(settings.files).map(line).join("");
  return `fields = {\n${body}}
files = [\n${files}]
headers = {"Content-Type": "multipart/form-data"}
video = client.post("/videos", cast_to=openai.types.Video, body=fields, files=files, options={"headers": headers})
video = client.videos.poll(video.id)`;
}

/** A value as Python writes it. */
function literal(value) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, each]) => `${literal(name)}: ${literal(each)}`).join(", ")}}`;
  }
  return typeof value === "string" ? JSON.stringify(value) : String(value);
}

// --- the dialog ---

/** Shows both, to be copied. */
export function showCode(settings) {
  const dialog = byId("code-dialog");
  const code = h("code", {});
  const box = h("pre", { class: "code", tabindex: "0", role: "tabpanel", id: "code-panel" }, code);
  const tab = (label, make) => h("button", {
    type: "button", role: "tab", class: "tab", "aria-controls": "code-panel",
    onclick: (event) => {
      tabs.forEach((each) => each.setAttribute("aria-selected", String(each === event.currentTarget)));
      tabs.forEach((each) => (each.tabIndex = each === event.currentTarget ? 0 : -1));
      box.setAttribute("aria-label", label);
      code.textContent = make(settings);
    },
    onkeydown: (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      const other = tabs[1 - tabs.indexOf(event.currentTarget)];
      other.click();
      other.focus();
    },
  }, label);
  const tabs = [tab("curl", curl), tab("Python", python)];
  const files = Object.values(settings.files).flat();
  const mask = settings.files.mask?.[0];
  const needs = files.length > 0 && h(
    "p",
    { class: "muted" },
    `It reads from the current directory: ${files.map(nameOf).join(", ")}. `,
    mask && h("a", { class: "link", href: URL.createObjectURL(mask), download: "mask.png" }, "Save mask.png"),
  );
  dialog.replaceChildren(
    h("div", { class: "dialog-head" },
      h("h2", { id: "code-title" }, "Use these settings in code"),
      button("x", "Close", () => dialog.close(), { kind: "quiet close" })),
    h("div", { class: "row tabs-row" },
      h("div", { class: "segmented", role: "tablist", "aria-label": "Language" }, tabs),
      h("span", { class: "spring" }),
      button("copy", "Copy", () => copy(code.textContent), { text: "Copy", kind: "plain" })),
    box,
    h("div", { class: "dialog-note" },
      needs,
      apiKey() !== null && h("p", { class: "muted" }, `Set ${KEY_VARIABLE} in the environment to your API key.`),
      h("p", { class: "muted" }, "Python needs the package openai: pip install openai")),
  );
  tabs[0].click();
  return ask(dialog);
}

/** Puts text on the clipboard; browsers offer that only to pages from localhost or over HTTPS. */
export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
  } else {
    const area = h("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied");
}
