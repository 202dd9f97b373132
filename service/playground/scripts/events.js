// Server-sent events out of a body that arrives in pieces. Knows nothing of what they say.

/** The data of each event, as it comes. Ends where the body ends, in the middle of an event or not. */
export async function* eventsOf(body) {
  const reader = body.getReader(); // no pipe: where the body breaks, a pipe throws away what nobody has read yet
  const decoder = new TextDecoder();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (waiting + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
      waiting = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
