// What was asked before, in this browser only.

import { byId, element } from "./element.js";

const STORE = "vlsae-history";
const MOST = 20;

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) || "[]");
    return Array.isArray(found) ? found : [];
  } catch {
    return []; // written by something else, or storage is forbidden
  }
}

/** The oldest go first where there is no room. */
function write(entries) {
  let kept = entries.slice(0, MOST);
  while (kept.length) {
    try {
      return localStorage.setItem(STORE, JSON.stringify(kept));
    } catch (error) {
      if (error.name !== "QuotaExceededError") return undefined;
      kept = kept.slice(0, -1);
    }
  }
  return localStorage.removeItem(STORE);
}

const changes = (edits = []) => edits.map(([, kind, label]) => ` · ${kind === "boost" ? "more" : "without"} ${label}`).join("");

export class History {
  /** `onOpen` gets an entry as it was added. */
  constructor(onOpen) {
    this.onOpen = onOpen;
    byId("clear").addEventListener("click", () => { write([]); this.show(); byId("question").focus(); });
    this.show();
  }

  add(entry) {
    write([{ ...entry, time: Date.now() }, ...read()]);
    this.show();
  }

  show() {
    const entries = read();
    byId("history").hidden = entries.length === 0;
    byId("history-list").replaceChildren(...entries.map((entry) => element("li", {},
      element("button", { type: "button", click: () => this.onOpen(entry) },
        element("img", { src: String(entry.thumbnail).startsWith("data:image/") ? entry.thumbnail : null, alt: "" }),
        element("span", { class: "history-words" },
          element("span", { class: "history-question", dir: "auto" }, entry.question),
          element("span", { class: "hint" }, `strength ${entry.strength}${changes(entry.edits)} · ${new Date(entry.time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" })}`))))));
  }
}
