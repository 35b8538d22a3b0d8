// How far a job is: a bar and a line of text, which keep themselves up to date.

import { h } from "./dom.js";
import { duration } from "./format.js";

/** "Step 7 of 20 · 35 % · about 4.2 s left" or "Waiting for its turn… 2 before it", as far as it is known. */
export function progressText(job) {
  if (job.state === "sending") return "Sending…";
  if (job.state === "queued") return `Waiting for its turn…${job.position ? ` ${job.position} before it` : ""}`;
  const parts = [];
  if (job.step !== null && job.total !== null) parts.push(`Step ${Math.min(job.step, job.total)} of ${job.total}`);
  if (job.fraction !== null) parts.push(`${Math.round(job.fraction * 100)} %`);
  if (job.eta !== null) parts.push(`about ${duration(job.eta)} left`);
  else parts.push(`${Math.round((Date.now() - job.created) / 1000)} s so far`);
  return job.fraction === null && job.step === null ? `Generating… ${parts.join(" · ")}` : parts.join(" · ");
}

/** {element}: a labelled progress bar with its text. It stops when the job ends. */
export function progressLine(job) {
  const fill = h("div", { class: "bar-fill" });
  const label = `Progress of the ${job.kind}`;
  const range = { "aria-valuemin": 0, "aria-valuemax": 100 };
  const bar = h("div", { class: "bar", role: "progressbar", "aria-label": label, ...range }, fill);
  const text = h("p", { class: "progress-text" });
  const show = () => {
    const known = job.fraction !== null && job.state === "running";
    bar.classList.toggle("unknown", !known);
    if (known) bar.setAttribute("aria-valuenow", String(Math.round(job.fraction * 100)));
    else bar.removeAttribute("aria-valuenow");
    bar.setAttribute("aria-valuetext", progressText(job));
    fill.style.width = known ? `${100 * job.fraction}%` : "";
    text.textContent = progressText(job);
    if (!job.running) clearInterval(timer);
  };
  const timer = setInterval(show, 1000);
  job.addEventListener("change", show);
  show();
  return { element: h("div", { class: "progress" }, bar, text) };
}
