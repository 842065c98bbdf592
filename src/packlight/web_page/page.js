// The page: words in, pictures out. All that computes is in worker.js.

import { firstLanguage, remember, WORDS } from "./words.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 24; // pictures at first, and more with each click

let language = firstLanguage();
let site = { title: "", examples: [], pictures: [], files: [] };
let shown = { order: [], scores: null, say: ["browse", {}] }; // what the list shows
let room = SHOWN;
let asked = 0; // number of the newest question
let waiting = null; // a question that came while the worker was busy
let busy = true; // until the model is ready
let opened = -1; // the picture in the dialog
let last = { step: "fetch", done: 0, total: 0, share: 0 };
let ready = 0; // milliseconds that starting took
const began = performance.now();

$("unserved").remove();

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
worker.onmessage = ({ data }) => answered(data);
worker.onerror = (event) => failed("other", event.message ?? "");

// Words ---------------------------------------------------------------------------------------------------------------

function text(key, values = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

const number = (value) => new Intl.NumberFormat(language).format(value);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const seconds = (ms) => (ms < 999.5 ? `${Math.max(1, Math.round(ms))} ms` : `${(ms / 1000).toFixed(1)} s`);

function translate() {
  document.documentElement.lang = WORDS[language].tag;
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = text(element.dataset.say);
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = text(element.dataset.hint);
  for (const element of document.querySelectorAll("[data-label]")) element.ariaLabel = text(element.dataset.label);
  document.title = site.title || text("title");
  $("title").textContent = document.title;
  const other = language === "en" ? "zh" : "en";
  $("language").textContent = WORDS[language].other;
  $("language").lang = WORDS[other].tag;
  tellStatus();
  tellStep();
  tellFacts();
}

function tellStatus() {
  const [key, values] = shown.say;
  const filled = { ...values, count: number(site.pictures.length), time: seconds(values.time ?? 0) };
  $("status").textContent = site.pictures.length ? text(key, filled) : "";
}

function tellStep() {
  const { step, done, total, share } = last;
  $("loading").hidden = step === "ready" || !site.pictures.length;
  if (step === "ready") return;
  // Fetching takes the first 60 % of the bar, decoding the rest.
  $("bar").value = step === "fetch" ? 0.6 * share : step === "decode" ? 0.6 + 0.35 * share : 0.97;
  const values = { done: megabytes(done), total: megabytes(total), share: `${Math.round(100 * share)} %` };
  $("step").textContent = text(step, values);
}

function tellFacts() {
  if (!ready) return;
  const { name, licence } = site.model;
  const size = megabytes(site.files.reduce((sum, file) => sum + file.bytes, 0));
  const values = { name, licence: licence && ` (${licence})`, size, time: seconds(ready) };
  $("facts").textContent = text("facts", values);
}

function failed(kind, detail) {
  last = { step: "ready" };
  tellStep();
  $("failure").hidden = false;
  $("failure").textContent = text(kind === "other" ? "other_failure" : kind, { detail });
}

// Asking and answering ------------------------------------------------------------------------------------------------

function ask(question) {
  asked += 1;
  waiting = { ...question, id: asked, sent: performance.now() };
  send();
}

function send() {
  if (busy || !waiting) return;
  busy = waiting;
  waiting = null;
  worker.postMessage(busy);
}

function answered(data) {
  if (data.failed) {
    failed(data.failed, data.detail);
    if (data.id === undefined) return; // the model did not start: nothing more to ask
  }
  if (data.step) {
    last = { ...last, ...data };
    tellStep();
    return;
  }
  if (data.ready !== undefined) {
    ready = performance.now() - began;
    last = { step: "ready" };
    document.body.dataset.state = "ready";
    tellStep();
    tellFacts();
  }
  if (data.order && data.id === asked) {
    const time = performance.now() - busy.sent;
    const name = busy.like === undefined ? "" : site.pictures[busy.like].name;
    $("failure").hidden = true;
    show({ ...data, say: name ? ["similar", { name, time }] : ["found", { time }] });
  }
  busy = false;
  send();
}

function search() {
  const words = $("words").value.trim();
  history.replaceState(null, "", words ? `#${encodeURIComponent(words)}` : location.pathname + location.search);
  if (words) ask({ words });
  else browse();
}

function browse() {
  asked += 1; // an answer that is still to come is no longer wanted
  waiting = null;
  show({ order: site.pictures.map((_, i) => i), scores: null, say: ["browse", {}] });
}

// The list ------------------------------------------------------------------------------------------------------------

function show(found) {
  shown = found;
  room = SHOWN;
  tellStatus();
  fill();
  document.body.dataset.answered = shown.scores ? $("words").value.trim() : "";
}

function fill() {
  const best = shown.scores ? shown.scores[shown.order[0]] : 1;
  const worst = shown.scores ? shown.scores[shown.order.at(-1)] : 0;
  const items = Array.from(shown.order.slice(0, room), (picture) => item(picture, best, worst));
  $("found").replaceChildren(...items);
  $("more").hidden = room >= shown.order.length;
}

function item(picture, best, worst) {
  const { file, name, width, height } = site.pictures[picture];
  const image = Object.assign(document.createElement("img"), { src: file, alt: "", width, height });
  image.decoding = "async";
  image.loading = "lazy";
  const title = Object.assign(document.createElement("span"), { className: "name", textContent: name });
  title.title = name;
  const button = Object.assign(document.createElement("button"), { type: "button", onclick: () => open(picture) });
  button.append(image, title);
  if (shown.scores) {
    const score = shown.scores[picture];
    const value = Object.assign(document.createElement("span"), { className: "score" });
    value.textContent = score.toFixed(3);
    value.ariaLabel = text("score", { score: score.toFixed(3) });
    value.style.setProperty("--share", Math.max(0.02, (score - worst) / (best - worst || 1)));
    button.append(value);
  }
  const entry = document.createElement("li");
  entry.dataset.picture = picture;
  entry.style.setProperty("--ratio", Math.min(1.9, Math.max(0.72, width / height)));
  entry.append(button);
  return entry;
}

function open(picture) {
  const { file, name, width, height } = site.pictures[picture];
  opened = picture;
  Object.assign($("picture"), { src: file, alt: name, width, height });
  $("name").textContent = name;
  $("score").textContent = shown.scores ? text("score", { score: shown.scores[picture].toFixed(3) }) : "";
  $("like").disabled = !ready;
  $("large").showModal();
}

// Begin ---------------------------------------------------------------------------------------------------------------

$("search").onsubmit = (event) => {
  event.preventDefault();
  search();
};
$("words").oninput = search;
$("language").onclick = () => {
  language = language === "en" ? "zh" : "en";
  remember(language);
  translate();
  fill();
};
$("more").onclick = () => {
  const next = room;
  room += SHOWN;
  fill();
  $("found").children[next]?.firstChild.focus();
};
$("like").onclick = () => {
  $("large").close();
  $("words").value = "";
  history.replaceState(null, "", location.pathname + location.search);
  ask({ like: opened });
  scrollTo({ top: 0 });
};
$("close").onclick = () => $("large").close();
$("large").onclick = (event) => event.target === $("large") && $("large").close();
document.onkeydown = (event) => {
  if (event.key !== "/" || event.target === $("words") || $("large").open) return;
  event.preventDefault();
  $("words").select();
};
window.onhashchange = () => readAddress() && search();

function readAddress() {
  try {
    $("words").value = decodeURIComponent(location.hash.slice(1));
  } catch {
    $("words").value = "";
  }
  return true;
}

async function begin() {
  translate();
  try {
    const response = await fetch(new URL("site.json", import.meta.url), { cache: "no-cache" });
    site = await response.json();
    if (site.packlight_site !== 1) throw new Error("another version");
  } catch {
    failed("site", "");
    return;
  }
  worker.postMessage({ site: { ...site, pictures: { length: site.pictures.length } } });
  translate();
  $("examples").append(
    ...site.examples.map((words) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: words });
      button.onclick = () => {
        $("words").value = words;
        search();
      };
      return button;
    }),
  );
  browse();
  readAddress();
  if ($("words").value) search();
}

begin();
