// What the atlas finds and how it orders it. Knows no page: node runs this file as well.
"use strict";

const AtlasSearch = (() => {
  const fold = (text) => text.normalize("NFC").toLowerCase();

  // Every word of the query must be somewhere in the haystack (folded beforehand).
  const words = (query) => fold(query).split(/\s+/).filter(Boolean);
  const matches = (haystack, wanted) => wanted.every((word) => haystack.includes(word));

  // Positions of the summary in the order asked for; `sort` names a column. Largest first, but labels and ids.
  function order(summary, sort, withSilent) {
    const column = summary.columns[sort];
    const positions = [];
    for (let at = 0; at < summary.columns.id.length; at++) {
      if (withSilent || !summary.columns.silent[at]) positions.push(at);
    }
    if (sort === "mean") return positions; // the order of the files
    if (sort === "label") {
      const collator = new Intl.Collator();
      return positions.sort((a, b) => (column[a] === "") - (column[b] === "") || collator.compare(column[a], column[b]) || a - b);
    }
    const sign = sort === "id" ? 1 : -1;
    return positions.sort((a, b) => sign * (column[a] - column[b]) || a - b);
  }

  // What of a concept is searched: its label, its texts.
  const haystack = (label, entry) => fold([label, ...entry.texts].join("\n"));

  return { fold, words, matches, order, haystack };
})();

if (typeof module !== "undefined") module.exports = AtlasSearch;
