// Asks for the key, when the service does.

import { byId } from "./element.js";
import { key } from "./service.js";

const WHY = "This service answers to those who have a key.";

/** Resolves to whether one was given. */
export function askForKey(why = WHY) {
  const dialog = byId("key-dialog");
  byId("key-why").textContent = why;
  byId("key").value = key.get();
  if (!dialog.open) dialog.showModal();
  byId("key").select();
  return new Promise((resolve) => {
    const done = (given) => { dialog.close(); resolve(given); };
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      key.set(byId("key").value.trim());
      done(Boolean(key.get()));
    };
    byId("key-cancel").onclick = () => done(false);
    dialog.oncancel = () => resolve(false);
  });
}
