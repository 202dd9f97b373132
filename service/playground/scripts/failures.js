// What went wrong, in plain words. Knows no elements.

const BY_CODE = {
  invalid_api_key: "The service asks for a key, and this one is not valid.",
  permission_denied: "This key is not allowed to do that.",
  rate_limit_exceeded: "The key's quota for this minute is used up.",
  overloaded: "The service has too much to do at the moment.",
  engine_unavailable: "The model is not there at the moment: it loads, or was lost with this request.",
  shutting_down: "This service is stopping.",
  request_timeout: "The answer took too long and was given up.",
  request_too_large: "The picture is too large for this service.",
  invalid_image: "The service cannot read this picture.",
  context_length_exceeded: "Picture and question together are too long for this model.",
  invalid_steering: "This cannot be steered.",
  internal_error: "The service failed on this request.",
};

/** A sentence or two for people; the service's own words where they say more. */
export function inWords(failure) {
  if (failure.kind === "stopped") return "Stopped. This is what had come.";
  if (failure.kind === "unreachable") return "The service does not answer. Is it running, and are you online?";
  if (failure.kind === "broken") {
    const why = failure.message ? ` The service says: ${failure.message}.` : "";
    return failure.text ? `The answer broke off; this is what had come.${why}` : `The answer broke off.${why}`;
  }
  const plain = BY_CODE[failure.code] || "The service refused this.";
  const its = failure.message && !["invalid_api_key", "internal_error"].includes(failure.code) ? ` (${failure.message})` : "";
  return plain + its;
}

/** Whether asking the same once more can help. */
export const worthRepeating = (failure) => failure.kind !== "refused" || [408, 429, 500, 503].includes(failure.status);

/** Whether it was the explanation, not the question, that was refused: then there is an answer without it. */
export function refusesExplanation(failure) {
  const field = String(failure.param || "");
  return failure.kind === "refused" && [400, 403].includes(failure.status) &&
    (field.startsWith("steering.explain") || (failure.status === 403 && /\bexplain\b/.test(failure.message)));
}
