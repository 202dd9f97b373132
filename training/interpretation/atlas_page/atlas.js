// The atlas's page. All text comes out of captions written by strangers, and goes in as text, never as markup.
"use strict";

const PAGE = 48;
const chunks = new Map(); // number -> promise of entries
const arrived = {}; // number -> what to do once it is there
const haystacks = new Map(); // position -> folded label and texts
let summary = null;
let shown = 0; // counts views, so that a slow one does not overwrite a newer one

const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// Called by data/*.js, which are scripts because a page opened from disk may not fetch files.
window.atlasSummary = (data) => { summary = data; };
window.atlasChunk = (number, entries) => arrived[number](entries);

function loadChunk(number) {
  if (!chunks.has(number)) {
    chunks.set(number, new Promise((resolve, reject) => {
      const file = `data/chunk_${String(number).padStart(4, "0")}.js`;
      const script = element("script", { src: file });
      arrived[number] = (entries) => { resolve(entries); script.remove(); };
      script.onerror = () => { chunks.delete(number); reject(new Error(`${file} cannot be read`)); };
      document.head.append(script);
    }));
  }
  return chunks.get(number);
}

async function entryAt(position) {
  const entries = await loadChunk(Math.floor(position / summary.chunk));
  return entries[position % summary.chunk];
}

const column = (name, position) => summary.columns[name][position];
const number = (value, digits = 4) => (value === null || value === undefined ? "–" : Number(value).toFixed(digits));
const name = (position) => column("label", position) || `concept ${column("id", position)}`;

// ---- where we are: #/?q=star&sort=label&page=2&silent=1 and #/concept/17
function place() {
  const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
  const options = new URLSearchParams(query);
  const concept = /^\/concept\/(\d+)$/.exec(path);
  return {
    concept: concept ? Number(concept[1]) : null,
    query: options.get("q") || "",
    sort: summary.columns[options.get("sort")] ? options.get("sort") : "mean",
    silent: options.get("silent") === "1",
    page: Math.max(1, Number.parseInt(options.get("page") || "1", 10) || 1),
  };
}

function address(change) {
  const { query, sort, silent, page } = { ...place(), page: 1, ...change };
  const options = new URLSearchParams();
  if (query) options.set("q", query);
  if (sort !== "mean") options.set("sort", sort);
  if (silent) options.set("silent", "1");
  if (page > 1) options.set("page", String(page));
  const text = options.toString();
  return text ? `#/?${text}` : "#/";
}

// ---- a list of concepts
function thumbnail(image, label) {
  const attributes = { alt: `Picture that activates “${label}”: ${image.reference}`, loading: "lazy", decoding: "async" };
  if (!image.thumbnail) return element("span", { class: "missing", title: image.reference, role: "img", "aria-label": attributes.alt });
  return element("img", { src: image.thumbnail, title: image.reference, ...attributes });
}

function bar(label, value, largest) {
  const meter = element("meter", { min: 0, max: largest || 1, value: value, "aria-label": `${label} ${number(value)}` });
  return element("div", { class: "bar" }, element("span", {}, label), meter, element("span", { class: "number" }, number(value)));
}

function card(position, entry) {
  const label = name(position);
  const pictures = entry.images.slice(0, 4).map((image) => thumbnail(image, label));
  return element("a", { class: "card", href: `#/concept/${column("id", position)}` },
    element("div", { class: "thumbnails" }, ...pictures),
    element("h2", { dir: "auto" }, label),
    element("p", { class: "text", dir: "auto" }, entry.texts[0] || "no text activates it"),
    element("p", { class: "figures" }, `#${column("id", position)} · activation ${number(column("mean", position))}`));
}

async function showPositions(positions, at, view) {
  const page = positions.slice((at.page - 1) * PAGE, at.page * PAGE);
  const entries = await Promise.all(page.map(entryAt));
  if (view !== shown) return;
  byId("view").replaceChildren(element("div", { class: "grid" }, ...page.map((position, index) => card(position, entries[index]))));
  showPages(positions.length, at);
}

function showPages(total, at) {
  const last = Math.max(1, Math.ceil(total / PAGE));
  const step = (label, page, key) => (page < 1 || page > last || page === at.page
    ? element("span", { class: "off" }, label)
    : element("a", { href: address({ page }), ...(key ? { "data-key": key } : {}) }, label));
  byId("pages").replaceChildren(step("First", 1), step("‹ Previous", at.page - 1, "ArrowLeft"),
    element("span", {}, `Page ${Math.min(at.page, last).toLocaleString()} of ${last.toLocaleString()}`),
    step("Next ›", at.page + 1, "ArrowRight"), step("Last", last));
}

async function showList(at, view) {
  const order = AtlasSearch.order(summary, at.sort, at.silent);
  if (!at.query) {
    say(`${order.length.toLocaleString()} concepts`);
    return showPositions(order, at, view);
  }
  return showFound(order, at, view);
}

// Labels are at hand; texts come chunk by chunk, and the page shows what is found so far.
async function showFound(order, at, view) {
  const wanted = AtlasSearch.words(at.query);
  const found = new Set(order.filter((position) => AtlasSearch.matches(AtlasSearch.fold(name(position)), wanted)));
  const listed = () => order.filter((position) => found.has(position));
  await showPositions(listed(), at, view);
  const needed = [...new Set(order.map((position) => Math.floor(position / summary.chunk)))];
  const allowed = new Set(order);
  for (const [done, numberOfChunk] of needed.entries()) {
    if (view !== shown) return;
    const before = found.size;
    const entries = await loadChunk(numberOfChunk);
    entries.forEach((entry, index) => {
      const position = numberOfChunk * summary.chunk + index;
      if (!allowed.has(position)) return;
      if (!haystacks.has(position)) haystacks.set(position, AtlasSearch.haystack(name(position), entry));
      if (AtlasSearch.matches(haystacks.get(position), wanted)) found.add(position);
    });
    if (view !== shown) return;
    const ready = done + 1 === needed.length;
    say(`${found.size.toLocaleString()} concepts with “${at.query}”${ready ? "" : `; ${Math.round((100 * (done + 1)) / needed.length)} % of the texts searched`}`);
    if (found.size > before && (ready || before < at.page * PAGE)) await showPositions(listed(), at, view);
  }
  if (view === shown) await showPositions(listed(), at, view);
}

// ---- one concept
async function showConcept(id, view) {
  const position = summary.columns.id.indexOf(id);
  byId("pages").replaceChildren();
  if (position < 0) {
    say(`There is no concept ${id}.`);
    return byId("view").replaceChildren();
  }
  const entry = await entryAt(position);
  if (view !== shown) return;
  say(`Concept ${id}`);
  const label = name(position);
  const largest = Math.max(column("image", position), column("text", position));
  const facts = [["Mean activation", column("mean", position)]];
  for (const [key, title] of [["intra_image", "Likeness of its pictures"], ["intra_text", "Likeness of its texts"], ["cross", "Pictures to texts"]]) {
    if (summary.columns[key]) facts.push([title, column(key, position)]);
  }
  byId("view").replaceChildren(element("article", {},
    element("h2", { dir: "auto" }, label),
    element("p", { class: "figures" }, `#${id}, rank ${(position + 1).toLocaleString()} of ${summary.columns.id.length.toLocaleString()} by activation`),
    bar("by images", column("image", position), largest), bar("by texts", column("text", position), largest),
    element("dl", {}, ...facts.flatMap(([title, value]) => [element("dt", {}, title), element("dd", {}, number(value))])),
    element("h3", {}, "Pictures that activate it most"),
    element("div", { class: "pictures" }, ...entry.images.map((image) => element("figure", {}, thumbnail(image, label), element("figcaption", { dir: "auto" }, image.reference)))),
    element("h3", {}, "Texts that activate it most"),
    element("ol", {}, ...entry.texts.map((text) => element("li", { dir: "auto" }, text)))));
  const step = (text, to, key) => (to < 0 || to >= summary.columns.id.length ? element("span", { class: "off" }, text)
    : element("a", { href: `#/concept/${column("id", to)}`, "data-key": key }, text));
  byId("pages").replaceChildren(step("‹ Stronger", position - 1, "ArrowLeft"),
    element("a", { href: "#/", "data-key": "Escape" }, "All concepts"), step("Weaker ›", position + 1, "ArrowRight"));
}

// ---- the page
function say(text) { byId("status").textContent = text; }

async function show() {
  const view = ++shown;
  const at = place();
  if (at.concept === null) {
    if (document.activeElement !== byId("query")) byId("query").value = at.query;
    byId("sort").value = at.sort;
    byId("silent").checked = at.silent;
  }
  try {
    await (at.concept === null ? showList(at, view) : showConcept(at.concept, view));
  } catch (error) {
    if (view === shown) say(error.message);
  }
}

function start() {
  if (!summary) return say("data/summary.js cannot be read");
  byId("about").textContent = summary.about;
  let waiting = 0;
  byId("query").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => location.replace(address({ query: byId("query").value.trim() })), 150);
  });
  byId("sort").addEventListener("change", () => { location.hash = address({ sort: byId("sort").value }); });
  byId("silent").addEventListener("change", () => { location.hash = address({ silent: byId("silent").checked }); });
  byId("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
  window.addEventListener("hashchange", () => { show(); window.scrollTo(0, 0); });
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "/") { event.preventDefault(); return byId("query").focus(); }
    const link = document.querySelector(`#pages a[data-key="${CSS.escape(event.key)}"]`);
    if (link) link.click();
  });
  show();
}

window.addEventListener("load", start);
