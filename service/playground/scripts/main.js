// The playground: start reading here. Brings the parts together; the service is asked by comparison.js and service.js.

import { Comparison } from "./comparison.js";
import { BOOST, nameOf } from "./concepts.js";
import { byId, element } from "./element.js";
import { inWords } from "./failures.js";
import { History } from "./history.js";
import { askForKey } from "./key_dialog.js";
import { Pictures, thumbnailOf } from "./pictures.js";
import { snippets, steeringOf } from "./requests.js";
import { describe, whyNotReady } from "./service.js";

const LOOK_EVERY_MS = 3000;
const SETTLED_MS = 450; // a dial that has not moved for so long has been set
const edits = new Map(); // concept id to "boost" or "remove"
const labels = new Map(); // concept id to its name
const kept = new Map(); // a thumbnail of this session to the picture it was made of
let picture = null;
let settling = 0;

const pictures = new Pictures((picked) => {
  picture = picked.url ? picked : null;
  changed();
});
const comparison = new Comparison({ onEdit: edit, onBusy: busy, onWhole: remember });
const history = new History(open);

// ---- asking
const strength = () => Number(byId("strength").value);
const question = () => byId("question").value.trim();
const settings = () => ({ picture, question: question(), strength: strength(), edits: new Map(edits) });

function submit(keepPlain = false) {
  clearTimeout(settling);
  if (!comparison.able.model) return undefined; // nobody to ask yet
  if (!picture) return pictures.complain("Choose a picture first.");
  if (!question()) return byId("question").focus();
  showAnswers();
  return comparison.run(settings(), { keepPlain: keepPlain && comparison.hasPlain(settings()) });
}

/** Where they are below what is in sight, as on a phone. */
function showAnswers() {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (byId("answers").getBoundingClientRect().top > 0.6 * innerHeight) byId("answers").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
}

function busy(on) {
  byId("go").textContent = "Ask again";
  byId("stop").hidden = !on;
  if (!on) showCode(); // it may have turned out what the service cannot do
}

function changed() {
  const value = strength();
  byId("strength-shown").textContent = value.toFixed(2);
  byId("strength").setAttribute("aria-valuetext", value === 0 ? "0, the plain model" : `${value.toFixed(2)} of 1`);
  byId("strength").style.setProperty("--share", String(value));
  showCode();
}

/** Once it rests; the plain answer stays as it is. */
function dialMoved() {
  clearTimeout(settling);
  if (comparison.asked && comparison.hasPlain(settings())) settling = setTimeout(() => submit(true), SETTLED_MS);
}

// ---- concepts
function edit(one, kind) {
  const id = String(one.id);
  labels.set(id, nameOf(one));
  if (kind) edits.set(id, kind);
  else edits.delete(id);
  showEdits();
  submit(true);
}

function showEdits() {
  byId("edits").hidden = edits.size === 0;
  byId("edits").replaceChildren(...[...edits].map(([id, kind]) => element("button", {
    type: "button", class: "chip", click: () => { edit({ id, label: labels.get(id) }, null); byId("strength").focus(); },
    "aria-label": `Take back: ${labels.get(id)} ${kind === "boost" ? "boosted" : "removed"}`,
  }, `${kind === "boost" ? `+${BOOST}` : "without"} ${labels.get(id)}`, element("span", { "aria-hidden": "true" }, " ×"))));
  changed();
}

// ---- code to copy
function showCode() {
  const { model, keyed, explains } = comparison.able;
  const asked = { model, question: question(), url: picture?.url, steering: steeringOf({ ...settings(), explain: explains }) };
  const base = new URL("./", document.baseURI).href;
  const all = snippets(asked, { base, keyed, file: (picture?.name || "picture.png").replaceAll(/[^\w.-]/g, "_") });
  const chosen = document.querySelector("#languages input:checked")?.value || "curl";
  byId("snippet").firstChild.textContent = all[chosen];
}

async function copy() {
  const code = byId("snippet").firstChild;
  try {
    await navigator.clipboard.writeText(code.textContent);
    byId("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code); // no clipboard outside of https and localhost
    byId("copy").textContent = "Selected: copy it";
  }
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 2000);
}

// ---- history
function remember(asked, plain, steered) {
  const thumbnail = thumbnailOf(byId("picture"));
  kept.set(thumbnail, asked.picture);
  history.add({
    question: asked.question, strength: asked.strength, edits: [...asked.edits].map(([id, kind]) => [id, kind, labels.get(id)]),
    scene: asked.picture.scene, name: asked.picture.name, thumbnail, plain: plain.text, steered: steered.text,
  });
}

async function open(entry) {
  byId("question").value = entry.question;
  byId("strength").value = entry.strength;
  edits.clear();
  for (const [id, kind, label] of entry.edits) { edits.set(id, kind); labels.set(id, label); }
  showEdits();
  if (entry.scene) await pictures.pickScene(entry.scene);
  else pictures.show(kept.get(entry.thumbnail) || { url: null, name: entry.name, alt: `A small copy of ${entry.name}`, scene: null }, entry.thumbnail);
  comparison.recall(entry);
  if (!picture) pictures.complain("Only this small copy was kept. Choose the picture again to ask about it.");
  byId("answers").focus();
}

// ---- the service
function notice(text) {
  byId("notice").hidden = !text;
  byId("notice").firstElementChild.textContent = text;
}

async function meet() {
  byId("status").textContent = "looking for the service…";
  try {
    comparison.able = await describe();
    const waitingFor = await whyNotReady();
    byId("status").textContent = `${comparison.able.model}${waitingFor ? ", not ready yet" : ""}`;
    byId("status").classList.toggle("ready", !waitingFor);
    byId("go").disabled = false;
    byId("key-button").hidden = !comparison.able.keyed;
    notice(waitingFor && `${waitingFor} This page looks again by itself.`);
    if (waitingFor) setTimeout(meet, LOOK_EVERY_MS);
    changed();
  } catch (failure) {
    byId("status").textContent = "no service";
    byId("status").classList.remove("ready");
    notice(failure.kind ? inWords(failure) : "What answers here is not the service that this page belongs to.");
  }
}

function wire() {
  byId("ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); submit(); }
  });
  byId("question").addEventListener("input", changed);
  byId("strength").addEventListener("input", changed);
  byId("strength").addEventListener("change", dialMoved);
  byId("stop").addEventListener("click", () => comparison.stop());
  byId("copy").addEventListener("click", copy);
  byId("notice").lastElementChild.addEventListener("click", meet);
  byId("key-button").addEventListener("click", () => askForKey());
  byId("languages").append(...["curl", "Python", "JavaScript"].map((name, index) => element("label", {},
    element("input", { type: "radio", name: "language", value: name, checked: index === 0, change: showCode }), element("span", {}, name))));
}

wire();
byId("unserved").hidden = true;
byId("main").hidden = false;
await Promise.all([meet(), pictures.showScenes().catch(() => pictures.complain("The bundled pictures cannot be loaded; choose your own."))]);
