// One question asked twice at the same time, plain and steered; then the two held against each other.

import { Answer } from "./answer.js";
import { showConcepts, withoutConcepts } from "./concepts.js";
import { announce, byId } from "./element.js";
import { inWords, refusesExplanation } from "./failures.js";
import { askForKey } from "./key_dialog.js";
import { bodyOf, steeringOf } from "./requests.js";
import { ask, key } from "./service.js";
import { compare, differing } from "./words.js";

const NO_EXPLANATION = "This service does not tell which concepts it finds.";

export class Comparison {
  /** `able`: what the service can do; `onEdit(concept, kind)`; `onBusy(bool)`; `onWhole(asked, plain, steered)`. */
  constructor({ onEdit, onBusy, onWhole }) {
    Object.assign(this, { onEdit, onBusy, onWhole });
    this.able = { model: "", explains: false, shows: false };
    this.whyUnexplained = NO_EXPLANATION;
    this.controller = null;
    this.asked = null;
    const again = () => this.run(this.asked);
    this.plain = new Answer(byId("plain"), "What the model says by itself.", again);
    this.steered = new Answer(byId("steered"), "What it says held to the picture.", again);
  }

  get running() {
    return this.controller !== null;
  }

  /** Whether a plain answer to this picture and question is there, so that only the steered one need be asked for. */
  hasPlain({ picture, question }) {
    return Boolean(this.plain.result && this.asked?.picture.url === picture?.url && this.asked.question === question);
  }

  stop() {
    this.controller?.abort();
  }

  /** `asked`: picture, question, strength and edits, which nobody changes any more. */
  async run(asked, { keepPlain = false } = {}) {
    this.stop();
    const controller = this.controller = new AbortController();
    this.asked = asked;
    this.onBusy(true);
    byId("difference").hidden = true;
    announce(keepPlain ? "Asking for the steered answer." : "Asking twice.");
    const { signal } = controller;
    const steering = (explain) => steeringOf({ ...asked, explain });
    const failures = await Promise.all([
      keepPlain ? null : this.one(this.plain, ":off", (explain) => (explain ? { explain: true } : {}), asked, signal),
      this.one(this.steered, "", steering, asked, signal),
    ]);
    if (this.controller !== controller) return; // a newer question took its place
    this.controller = null;
    this.onBusy(false);
    await this.conclude(asked, failures.filter(Boolean));
  }

  /** The failure, where there was one. Where only the explanation is refused, it is done without. */
  async one(answer, alias, steering, asked, signal) {
    answer.wait();
    const body = (explain) => bodyOf({ ...asked, url: asked.picture.url, model: this.able.model + alias, steering: steering(explain) });
    const options = { signal, onText: (text) => { if (!signal.aborted) answer.grow(text); } };
    try {
      const explain = this.able.explains;
      const result = await ask(body(explain), options).catch((failure) => {
        if (!explain || !refusesExplanation(failure)) throw failure;
        this.able = { ...this.able, explains: false };
        this.whyUnexplained = `Without concepts: ${inWords(failure)}`;
        return ask(body(false), options);
      });
      answer.whole(result);
      return null;
    } catch (failure) {
      if (!("kind" in failure)) throw failure;
      if (this.asked === asked) answer.fail(failure); // a newer question writes in its place
      return failure;
    }
  }

  async conclude(asked, failures) {
    const denied = failures.find((failure) => failure.status === 401);
    if (denied) {
      if (await askForKey(key.get() ? inWords(denied) : undefined)) await this.run(asked);
      return;
    }
    if (failures.length) {
      withoutConcepts(""); // those there are belong to an answer that is gone
      announce([...new Set(failures.map(inWords))].join(" "));
      return;
    }
    this.hold();
    this.explain(asked);
    this.onWhole(asked, this.plain.result, this.steered.result);
  }

  /** Marks what differs, and says it. */
  hold() {
    const plain = this.plain.result.text.trim(), steered = this.steered.result.text.trim();
    const parts = compare(plain, steered);
    byId("difference").hidden = false;
    if (!parts) return this.conclusion("The answers are too long to compare word by word.");
    this.plain.mark(parts.left, "only here");
    this.steered.mark(parts.right, "only here");
    const gone = differing(parts.left), come = differing(parts.right);
    if (!gone.length && !come.length) return this.conclusion("Both say the same, word for word.");
    return this.conclusion([listed("Only plain", gone), listed("Only steered", come)].filter(Boolean).join(" "));
  }

  conclusion(text) {
    byId("difference").textContent = text;
    announce(`Both answers are there. ${text}`);
  }

  explain(asked) {
    const explanation = this.steered.result.receipt?.explanation?.[0];
    if (explanation) showConcepts(explanation, { edits: asked.edits, onEdit: this.onEdit, examples: this.able.shows });
    else withoutConcepts(this.able.explains ? "There is nothing to tell of concepts in this answer." : this.whyUnexplained);
  }

  /** An entry of the history, as it was. */
  recall({ plain, steered }) {
    this.stop();
    this.asked = null;
    this.plain.recall(plain);
    this.steered.recall(steered);
    withoutConcepts("");
    this.hold();
  }
}

function listed(title, words) {
  if (!words.length) return "";
  const some = words.slice(0, 8).map((word) => `“${word}”`).join(", ");
  return `${title}: ${some}${words.length > 8 ? ", and more" : ""}.`;
}
