// What is asked for: the body of a request, and the same as code to copy. Knows no elements.

import { editOf } from "./concepts.js";

/** Without a picture's bytes where `url` is a stand-in for them. */
export function bodyOf({ model, question, url, steering }) {
  const content = [{ type: "image_url", image_url: { url } }, { type: "text", text: question }];
  const body = { model, messages: [{ role: "user", content }], temperature: 0 };
  return Object.keys(steering).length ? { ...body, steering } : body;
}

/** Of the steered answer. */
export function steeringOf({ strength, edits, explain }) {
  const concepts = Object.fromEntries([...edits].map(([id, kind]) => [id, editOf(kind)]));
  return { strength, ...(explain ? { explain: true } : {}), ...(edits.size ? { concepts } : {}) };
}

const PICTURE = "@picture@";

/** `asked`: as for bodyOf, its `url` a data URL; `base`: the service's address; `file`: where the picture lies. */
export function snippets(asked, { base, keyed, file }) {
  const kind = /^data:([\w/+.-]+)[;,]/.exec(asked.url || "")?.[1] || "image/png";
  const body = bodyOf({ ...asked, url: PICTURE });
  return { curl: curl(body, base, keyed, file, kind), Python: python(body, base, keyed, file, kind), JavaScript: javascript(body, base, keyed, file, kind) };
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`; // for a shell

function curl(body, base, keyed, file, kind) {
  const [head, tail] = JSON.stringify(body).split(PICTURE);
  return [
    `{ printf %s ${quoted(`${head}data:${kind};base64,`)}`,
    `  base64 < ${quoted(file)} | tr -d '\\n'`,
    `  printf %s ${quoted(tail)}`,
    `} | curl -sS ${quoted(`${base}v1/chat/completions`)} -H 'Content-Type: application/json' \\`,
    ...(keyed ? ['  -H "Authorization: Bearer $KEY" \\'] : []),
    "  -d @-",
  ].join("\n");
}

function python(body, base, keyed, file, kind) {
  const steering = body.steering ? [`    extra_body={"steering": ${literal(body.steering)}},`] : [];
  return [
    "import base64", ...(keyed ? ["import os"] : []), "from openai import OpenAI", "",
    `client = OpenAI(base_url=${literal(`${base}v1`)}, api_key=${keyed ? 'os.environ["KEY"]' : '"unused"'})`,
    `picture = base64.b64encode(open(${literal(file)}, "rb").read()).decode()`,
    "answer = client.chat.completions.create(",
    `    model=${literal(body.model)},`,
    '    messages=[{"role": "user", "content": [',
    `        {"type": "image_url", "image_url": {"url": f"data:${kind};base64,{picture}"}},`,
    `        {"type": "text", "text": ${literal(body.messages[0].content[1].text)}},`,
    "    ]}],",
    "    temperature=0,", ...steering, ")",
    "print(answer.choices[0].message.content)",
    "print(answer.steering)",
  ].join("\n");
}

/** JSON as Python writes it. */
function literal(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one)}`).join(", ")}}`;
}

function javascript(body, base, keyed, file, kind) {
  const written = JSON.stringify(body, null, 2).replace(`"${PICTURE}"`, `\`data:${kind};base64,\${picture}\``);
  const headers = ['"content-type": "application/json"', ...(keyed ? ["authorization: `Bearer ${process.env.KEY}`"] : [])];
  return [
    'import { readFile } from "node:fs/promises";', "",
    `const picture = (await readFile(${JSON.stringify(file)})).toString("base64");`,
    `const response = await fetch(${JSON.stringify(`${base}v1/chat/completions`)}, {`,
    '  method: "POST",', `  headers: { ${headers.join(", ")} },`,
    `  body: JSON.stringify(${written.replaceAll("\n", "\n  ")}),`, "});",
    "const answer = await response.json();",
    "console.log(answer.choices[0].message.content);",
    "console.log(answer.steering);",
  ].join("\n");
}
