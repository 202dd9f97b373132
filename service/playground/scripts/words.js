// Which words of two texts differ: what is left of each beside their longest common subsequence. Knows no elements.

const MOST_CELLS = 4_000_000; // of the table: two answers of 2,000 words

/** Both texts in parts, `{ text, differs }`; null where they are too long to compare. */
export function compare(left, right) {
  const a = segments(left), b = segments(right);
  const wordsA = a.filter((one) => one.isWordLike).map((one) => one.segment);
  const wordsB = b.filter((one) => one.isWordLike).map((one) => one.segment);
  if ((wordsA.length + 1) * (wordsB.length + 1) > MOST_CELLS) return null;
  const [keptA, keptB] = common(wordsA, wordsB);
  return { left: parts(a, keptA), right: parts(b, keptB) };
}

/** By the language's own rules, so that words need no spaces between them. */
function segments(text) {
  return [...new Intl.Segmenter(undefined, { granularity: "word" }).segment(text)];
}

/** Positions in `a` and in `b` of one longest common subsequence. */
function common(a, b) {
  const width = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * width); // of what begins at (i, j)
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const here = i * width + j;
      longest[here] = a[i] === b[j] ? longest[here + width + 1] + 1 : Math.max(longest[here + width], longest[here + 1]);
    }
  }
  const keptA = new Set(), keptB = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { keptA.add(i++); keptB.add(j++); }
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return [keptA, keptB];
}

/** Neighbours of one kind joined; what stands between two words that differ differs, too. */
function parts(found, kept) {
  let word = 0;
  const marks = found.map(({ isWordLike }) => (isWordLike ? !kept.has(word++) : null));
  let next = false;
  const nextWord = marks.map(() => false);
  for (let place = marks.length - 1; place >= 0; place -= 1) {
    nextWord[place] = next;
    next = marks[place] ?? next;
  }
  const made = [];
  let lastWord = false;
  found.forEach(({ segment }, place) => {
    const differs = marks[place] ?? (lastWord && nextWord[place]);
    lastWord = marks[place] ?? lastWord;
    if (made.at(-1)?.differs === differs) made.at(-1).text += segment;
    else made.push({ text: segment, differs });
  });
  return made;
}

/** The words that differ, for a sentence. */
export const differing = (someParts) => someParts.filter((part) => part.differs).map((part) => part.text.trim());
