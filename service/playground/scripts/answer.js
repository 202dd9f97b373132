// One of the two answers: waiting, growing, whole, broken off. Asks nobody.

import { bar, element } from "./element.js";
import { inWords, worthRepeating } from "./failures.js";

const CUES = { canary: "model verified", relative_shift: "mean shift", positions: "positions steered", min_answer_tokens: "plain first tokens" };
const FACTS = ["preset", "form", "mode", "strength", "alpha", "positions", "relative_shift", "min_answer_tokens", "clamped_positions", "canary", "arm"];

export class Answer {
  /** `placeholder`: before anything is asked. `again`: what to do where the same is to be asked once more. */
  constructor(article, placeholder, again) {
    this.article = article;
    this.body = article.querySelector(".answer-body");
    this.again = again;
    this.placeholder = placeholder;
    this.timer = 0;
    this.empty();
  }

  empty() {
    this.stopClock();
    this.result = null;
    this.body.replaceChildren(element("p", { class: "placeholder" }, this.placeholder));
  }

  /** Asked, and not a word yet. */
  wait() {
    this.result = null;
    this.began = performance.now();
    this.words = element("p", { class: "words", dir: "auto" });
    this.progress = element("p", { class: "progress" }, element("span", { class: "dots", "aria-hidden": "true" }), element("span", {}, "Asking"));
    this.article.setAttribute("aria-busy", "true");
    this.body.replaceChildren(this.words, this.progress);
    this.stopClock();
    this.timer = setInterval(() => {
      const seconds = Math.round((performance.now() - this.began) / 1000);
      if (seconds >= 2) this.progress.lastChild.textContent = `${this.words.textContent ? "Writing" : "Sent; waiting for the first word"}, ${seconds} s`;
    }, 500);
  }

  grow(text) {
    if (!this.words.textContent) {
      this.first = performance.now();
      this.progress.lastChild.textContent = "Writing";
    }
    this.words.textContent = text.trimStart();
  }

  whole(result) {
    this.end();
    this.result = result;
    this.words.textContent = result.text.trim() || "(an empty answer)";
    const seconds = (performance.now() - this.began) / 1000;
    const facts = [`${result.usage?.completion_tokens ?? "?"} tokens`, `${seconds.toFixed(1)} s`];
    if (result.finish === "length") facts.push("cut off at the limit");
    this.progress.replaceWith(element("p", { class: "facts" }, facts.join(" · ")), ...receipt(result.receipt));
  }

  /** Kept from another day: words only. */
  recall(text) {
    this.wait();
    this.end();
    this.result = { text, receipt: null };
    this.words.textContent = text.trim();
    this.progress.replaceWith(element("p", { class: "facts" }, "from your history"));
  }

  fail(failure) {
    this.end();
    if (failure.text) this.words.textContent = failure.text.trim();
    else this.words.remove();
    this.article.classList.toggle("broken", Boolean(failure.text));
    const button = worthRepeating(failure) && element("button", { type: "button", class: "quiet again", click: () => this.again() }, "Ask again");
    if (button && failure.retryAfter) this.countDown(button, failure.retryAfter);
    this.progress.replaceWith(element("div", { class: "problem" }, element("p", {}, inWords(failure)), button || null));
  }

  /** Not before the service wants to hear of it again. */
  countDown(button, seconds) {
    button.disabled = true;
    const tick = () => {
      button.textContent = seconds > 0 ? `Ask again in ${seconds} s` : "Ask again";
      button.disabled = seconds > 0;
      if (seconds <= 0) this.stopClock();
      seconds -= 1;
    };
    tick();
    this.timer = setInterval(tick, 1000);
  }

  /** Parts of `words.js`; `only`: whose words the marked ones are, said to who cannot see the mark. */
  mark(parts, only) {
    this.words.replaceChildren(...parts.map((part) => (part.differs
      ? element("mark", {}, element("span", { class: "unseen" }, `[${only}: `), part.text, element("span", { class: "unseen" }, "]"))
      : part.text)));
  }

  end() {
    this.stopClock();
    this.article.removeAttribute("aria-busy");
    this.article.classList.remove("broken");
  }

  stopClock() {
    clearInterval(this.timer);
  }
}

/** What was done, or why nothing was. */
function receipt(given) {
  if (!given) return [];
  const made = [];
  if (given.mismatch?.[0]) made.push(mismatch(given.mismatch[0], given.applied));
  if (!given.applied && given.reason && given.strength) made.push(element("p", { class: "hint" }, `Not steered: ${given.reason}.`));
  if (given.applied) {
    const rows = FACTS.filter((name) => given[name] !== null && given[name] !== undefined).flatMap((name) => [
      element("dt", {}, CUES[name] || name.replaceAll("_", " ")), element("dd", {}, shown(name, given[name]))]);
    made.push(element("details", { class: "receipt" }, element("summary", {}, "What was done"), element("dl", {}, ...rows)));
  }
  return made;
}

function mismatch({ before, after }, applied) {
  const written = applied ? `${before.toFixed(2)} → ${after.toFixed(2)}` : before.toFixed(2);
  return element("p", { class: "mismatch", title: "How far the text's concepts are from the picture's: 0 the same, 1 nothing in common" },
    element("span", {}, "Mismatch"), bar("mismatch-bar", applied ? after : before), element("span", { class: "number" }, written));
}

function shown(name, value) {
  const one = Array.isArray(value) ? value[0] : value;
  if (name === "relative_shift") return `${(100 * one).toFixed(0)} %`;
  return typeof one === "number" ? String(Number(one.toFixed(4))) : String(one);
}
