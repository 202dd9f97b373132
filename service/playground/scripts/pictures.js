// The picture that is asked about: a bundled scene, or one chosen, dropped or pasted. It goes nowhere but to the service.

import { byId, element } from "./element.js";

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const THUMBNAIL_PX = 96;
const dataUrls = new Map(); // of scenes, by file

/** `onPick` gets `{ url, name, alt, scene }`: `url` a data URL, `scene` a file of ours or null. */
export class Pictures {
  constructor(onPick) {
    this.onPick = onPick;
    this.current = null;
    byId("file").addEventListener("change", (event) => this.take(event.target.files[0]));
    document.addEventListener("paste", (event) => this.takeFrom(event.clipboardData, event));
    this.watchDrops();
  }

  async showScenes() {
    const scenes = await (await fetch(new URL("playground/scenes/scenes.json", document.baseURI))).json();
    this.scenes = scenes;
    byId("scenes").replaceChildren(...scenes.map((scene) => element("button", {
      type: "button", class: "scene", "aria-pressed": "false", "data-scene": scene.file, "aria-label": scene.alt,
      title: scene.alt, click: () => this.pickScene(scene.file),
    }, element("img", { src: address(scene.file), alt: "" }))));
    await this.pickScene(scenes[0].file);
  }

  async pickScene(file) {
    const scene = this.scenes.find((one) => one.file === file);
    if (!dataUrls.has(file)) dataUrls.set(file, await asDataUrl(await (await fetch(address(file))).blob()));
    this.show({ url: dataUrls.get(file), name: file, alt: scene.alt, scene: file });
  }

  async take(file) {
    if (!file) return;
    if (!KINDS.includes(file.type)) return this.complain(`“${file.name}” is not a PNG, JPEG, WebP or GIF picture.`);
    this.show({ url: await asDataUrl(file), name: file.name || "pasted picture", alt: `Your picture ${file.name}`, scene: null });
  }

  takeFrom(transfer, event) {
    const files = [...(transfer?.files || [])];
    if (!files.length) return;
    event.preventDefault();
    this.take(files.find((file) => KINDS.includes(file.type)) || files[0]);
  }

  /** A null `url`: only a small copy is left, which nobody can be asked about. */
  show(picture, small = null) {
    this.complain("");
    this.current = picture.url ? picture : null;
    byId("picture").src = picture.url || small;
    byId("picture").alt = picture.alt;
    for (const button of byId("scenes").children) {
      button.setAttribute("aria-pressed", String(button.dataset.scene === picture.scene));
    }
    this.onPick(picture);
  }

  complain(problem) {
    byId("picture-problem").textContent = problem;
    byId("picture-problem").hidden = !problem;
  }

  watchDrops() {
    const mark = (on) => byId("drop").classList.toggle("over", on);
    document.addEventListener("dragover", (event) => { event.preventDefault(); mark(true); });
    document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) mark(false); });
    document.addEventListener("drop", (event) => { event.preventDefault(); mark(false); this.takeFrom(event.dataTransfer, event); });
    byId("picture").addEventListener("error", () => this.complain("This browser cannot show that picture; the service may not read it either."));
    byId("picture").addEventListener("load", ({ target }) => target.classList.toggle("small", target.naturalWidth < 200));
  }
}

const address = (file) => new URL(`playground/scenes/${file}`, document.baseURI).href;

function asDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** A small JPEG of what is shown, as a data URL. */
export function thumbnailOf(image) {
  const scale = Math.min(1, THUMBNAIL_PX / Math.max(image.naturalWidth, image.naturalHeight, 1));
  const canvas = element("canvas");
  canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.8);
}
