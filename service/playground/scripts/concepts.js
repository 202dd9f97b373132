// Concepts of picture and text as bars; what each looks like, and the buttons that change it.

import { bar, byId, element } from "./element.js";
import { concept, thumbnail } from "./service.js";

export const BOOST = 2; // added to a concept's activation
const PICTURES = 4;

export const editOf = (kind) => (kind === "boost" ? { add: BOOST } : { factor: 0 });
export const nameOf = (one) => one.label || `concept ${one.id}`;

/** Says why there are none. */
export function withoutConcepts(why) {
  byId("concepts").hidden = !why;
  byId("concepts-about").textContent = why;
  byId("concepts-lists").replaceChildren();
}

/**
 * `edits`: id to "boost" or "remove", as the answer was made; `onEdit(one, kind)`: the reader changes one, kind null
 * takes the change back; `examples`: whether the service can show what a concept looks like.
 */
export function showConcepts(explanation, { edits, onEdit, examples }) {
  const focused = document.activeElement?.dataset.change;
  byId("concepts").hidden = false;
  byId("concepts-about").textContent = "The strongest in the picture, and in the steered answer before and after its steps. " +
    (examples ? "Point at one, or tap it, to see what it looks like. " : "") + "Boost or remove one, and the steered answer is asked for again.";
  const numbers = [...explanation.image, ...explanation.text].flatMap((one) => [one.image, one.text, one.steered]);
  const most = Math.max(...numbers, 1e-9);
  const row = (kinds) => (one) => conceptRow(one, kinds, most, { edits, onEdit, examples });
  byId("concepts-lists").replaceChildren(
    list("In the picture", explanation.image.map(row([["picture", "image"]]))),
    list("In the text", explanation.text.map(row([["before", "text"], ["after", "steered"]]))));
  if (focused) (document.querySelector(`[data-change="${focused}"]`) || byId("concepts-title")).focus();
}

function list(title, rows) {
  const filled = rows.length ? element("ul", { class: "bars" }, ...rows) : element("p", { class: "hint" }, "none");
  return element("section", {}, element("h3", {}, title), filled);
}

function conceptRow(one, kinds, most, { edits, onEdit, examples }) {
  const name = nameOf(one);
  const numbers = kinds.map(([, field]) => one[field].toFixed(2)).join(" → ");
  const chosen = edits.get(String(one.id)) || null;
  const card = element("div", { class: "card", id: `card-${kinds[0][0]}-${one.id}`, hidden: true });
  const title = examples
    ? element("button", { type: "button", class: "concept-name", "aria-expanded": "false", "aria-controls": card.id }, name)
    : element("span", { class: "concept-name" }, name);
  const change = (kind, text, sign) => element("button", {
    type: "button", class: "change", "aria-pressed": String(chosen === kind), "data-change": `${kinds[0][0]}-${one.id}-${kind}`, "aria-label": `${text} ${name}`, title: text,
    click: () => onEdit(one, chosen === kind ? null : kind),
  }, sign);
  const made = element("li", { class: `concept ${chosen || ""}` },
    element("div", { class: "concept-head" }, title,
      element("span", { class: "number" }, element("span", { class: "unseen" }, `${kinds.map(([kind]) => kind).join(", then ")}: `), numbers),
      element("span", { class: "changes" }, change("boost", "Boost", "+"), change("remove", "Remove", "−"))),
    ...kinds.map(([kind, field]) => bar(kind, one[field] / most)), card);
  if (examples) showOnDemand(made, title, card, one);
  return made;
}

/** By pointer, by focus or by a tap; Escape puts it away, and the pointer may move onto it. */
function showOnDemand(made, title, card, one) {
  let filled = false;
  const open = (on) => {
    card.hidden = !on;
    title.setAttribute("aria-expanded", String(on));
    if (on && !filled) { filled = true; fill(card, one); }
  };
  title.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && open(true));
  made.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && open(false));
  made.addEventListener("focusout", (event) => { if (!made.contains(event.relatedTarget)) open(false); });
  made.addEventListener("keydown", (event) => { if (event.key === "Escape") open(false); });
  title.addEventListener("focus", () => { if (title.matches(":focus-visible")) open(true); });
  title.addEventListener("click", (event) => open(event.detail === 0 ? card.hidden : true));
}

async function fill(card, one) {
  card.replaceChildren(element("p", { class: "hint" }, "Looking it up…"));
  try {
    const found = await concept(one.id);
    const pictures = await Promise.all(found.images.filter((image) => image.thumbnail).slice(0, PICTURES).map(
      async (image) => element("img", { src: await thumbnail(image.thumbnail), alt: image.reference || "an example", loading: "lazy" })));
    card.replaceChildren(
      element("p", { class: "card-title" }, `${nameOf(one)} · #${one.id}`),
      pictures.length ? element("div", { class: "card-pictures" }, ...pictures) : element("p", { class: "hint" }, "No example pictures."),
      element("ul", {}, ...found.texts.slice(0, 2).map((text) => element("li", { dir: "auto" }, text))));
  } catch {
    card.replaceChildren(element("p", { class: "hint" }, "Its examples cannot be had at the moment."));
  }
}
