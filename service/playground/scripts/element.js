// Elements made and found. Text goes in as text, never as markup.

export const byId = (id) => document.getElementById(id);

/** `attributes`: functions become listeners of that event, true an empty attribute; false and null are left out. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A bar whose length is a share, 0 to 1; what it says stands beside it as text. */
export function bar(kind, share) {
  const made = element("span", { class: `bar ${kind}`, "aria-hidden": "true" });
  made.style.setProperty("--share", String(Math.min(1, Math.max(0, share))));
  return made;
}

/** Reads it to who cannot see the page: whole sentences, rarely. */
export function announce(text) {
  byId("announcer").textContent = text;
}
