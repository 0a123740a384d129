// The budget slider of a profile. All maps of its curve came at once, so dragging asks nobody; when
// the hand lets go, the service is asked for the exact map of the budget that is then shown.
import { fetchArrays } from "./arrays.js";
import { widthScale } from "./colours.js";
import { Curve } from "./curve.js";
import { Heatmap } from "./heatmap.js";
import { Model } from "./model.js";
import { bytes, figure, loss } from "./numbers.js";

const MEGA = 1e6;

class Slider {
  constructor(root, model, maps) {
    this.root = root;
    this.model = model;
    this.maps = maps;
    this.beside = 0;
    this.asked = 0;
    this.notice = document.getElementById("budget-error");
    this.form = root.querySelector("form");
    this.range = root.querySelector("input[type=range]");
    this.kind = this.form.elements.kind;
    this.value = this.form.elements.value;
    this.memory = root.querySelector("[data-memory]");
    this.trust = root.dataset.trust.split(" ").map(Number);
    this.curve = new Curve(root.querySelector(".curve"), maps, this.trust);
    this.heatmap = new Heatmap(root.querySelector(".map canvas"), model, {
      onPoint: (cell, value) => this.read(cell, value),
      onOpen: () => {},
    });
    this.range.max = maps.size.length - 1;
    this.range.addEventListener("input", () => this.drag());
    this.range.addEventListener("change", () => this.settle());
    this.value.addEventListener("change", () => this.typed());
    for (const choice of this.kind) choice.addEventListener("change", () => this.change());
    for (const field of this.memory.querySelectorAll("input")) field.addEventListener("change", () => this.change());
    this.marks();
    this.range.value = this.nearest(maps.bits, 3);
    this.begin();
  }

  /** What a point of the curve is in the unit of the chosen target. */
  inUnit(point) {
    const kind = this.kind.value;
    if (kind === "max_loss_increase") return point.predicted_loss;
    if (kind === "bits") return point.bits;
    return (point.size + (kind === "memory" ? this.beside : 0)) / MEGA;
  }

  point(index, prefix = "") {
    const names = ["size", "bits", "code_bits", "predicted_loss"];
    return Object.fromEntries(names.map((name) => [name, this.maps[prefix + name][index]]));
  }

  /** Shows the curve's map under the handle; nothing is asked for. */
  showCurve() {
    const index = Number(this.range.value);
    const count = this.model.groups;
    this.asked += 1;
    this.show(this.maps.widths.subarray(index * count, (index + 1) * count), this.point(index));
  }

  drag() {
    this.showCurve();
    this.value.value = this.rounded(this.inUnit(this.point(Number(this.range.value))));
  }

  /** Up, so that the budget holds the map it was read from. */
  rounded(value) {
    const digits = this.kind.value === "bits" ? 3 : this.kind.value === "max_loss_increase" ? 5 : 2;
    return (Math.ceil(value * 10 ** digits) / 10 ** digits).toFixed(digits);
  }

  /** With the budget that the page was opened with, if there is one. */
  async begin() {
    const given = this.value.value;
    await this.change();
    if (!given) return;
    this.value.value = given;
    this.typed();
  }

  async change() {
    if (this.kind.value === "memory" && !(await this.measureBeside())) {
      this.kind.value = "size";
      this.form.querySelector("[value=memory]").disabled = true;
    } else {
      this.notice.hidden = true;
    }
    this.memory.hidden = this.kind.value !== "memory";
    this.form.querySelector("[data-unit]").textContent =
      { bits: "bits a weight", max_loss_increase: "nats a token" }[this.kind.value] ?? "MB";
    this.drag();
    await this.settle();
  }

  /** What a runtime needs beside the weights: the difference between memory and size of a map. */
  async measureBeside() {
    const found = await this.allocate({ ...this.memoryFields(), memory: 2 ** 52 });
    if (found) this.beside = found.curve[0].budget - found.curve[0].size;
    return found;
  }

  memoryFields() {
    const fields = [...this.memory.querySelectorAll("input")].filter((field) => field.value);
    return Object.fromEntries(fields.map((field) => [field.name, Number(field.value)]));
  }

  /** The service's own map for the budget in the field. */
  async settle() {
    const kind = this.kind.value;
    const inBytes = kind === "size" || kind === "memory";
    const value = inBytes ? Math.floor(Number(this.value.value) * MEGA) : Number(this.value.value);
    const number = ++this.asked;
    const fields = kind === "memory" ? this.memoryFields() : {};
    const found = await this.allocate({ ...fields, [kind]: value }, [1]);
    if (!found || number !== this.asked) return;
    const widths = Uint8Array.from(this.model.names.map((name) => found.map.linears[name]).join(""), Number);
    this.show(widths, found);
  }

  /** The service's answer; null where it refuses, or the key may only read. `curve`: budgets of points. */
  async allocate(budget, curve = []) {
    if (!this.root.dataset.allocate) return null;
    const answer = await fetch(this.root.dataset.allocate, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ budget, curve }),
    });
    const found = await answer.json();
    if (answer.ok) return found;
    this.notice.textContent = found.detail;
    this.notice.hidden = false;
    return null;
  }

  typed() {
    const points = Array.from(this.maps.size, (_, index) => this.inUnit(this.point(index)));
    this.range.value = this.nearest(points, Number(this.value.value));
    this.notice.hidden = true;
    this.showCurve();
    this.settle();
  }

  nearest(values, wanted) {
    let best = 0;
    values.forEach((value, index) => {
      if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = index;
    });
    return best;
  }

  show(widths, point) {
    this.heatmap.show({
      legend: "mean width in bits; below it the width of every group",
      cell: (linears) => this.model.mean(linears, widths),
      groups: widths,
      scale: (this.scale ??= widthScale()),
      groupScale: this.scale,
      text: figure,
    });
    const [low, high] = this.trust.map((factor) => loss(factor * point.predicted_loss));
    const facts = {
      size: bytes(point.size),
      memory: bytes(point.size + this.beside),
      bits: `${figure(point.bits)} (${figure(point.code_bits)} in codes)`,
      loss: loss(point.predicted_loss),
      range: `${low} to ${high}`,
    };
    for (const [name, text] of Object.entries(facts)) {
      const place = this.root.querySelector(`[data-fact=${name}]`);
      if (place) place.textContent = text;
    }
    this.root.querySelector("[data-fact=memory]").parentElement.hidden = this.kind.value !== "memory";
    this.range.setAttribute("aria-valuetext", `${facts.size}, ${facts.bits} bits, predicted loss ${facts.loss}`);
    this.curve.place(point);
  }

  read({ row, column }, value) {
    const { blocks, modules } = this.model;
    const place = blocks[row] ? `${blocks[row]}.` : "";
    this.root.querySelector("[data-reading]").textContent = `${place}${modules[column]}: mean width ${figure(value)}`;
  }

  /** Buttons at the sizes of maps with one width; the slider is even in bytes. */
  marks() {
    const { size, uniform_widths: widths, uniform_size: sizes } = this.maps;
    const span = size[size.length - 1] - size[0] || 1;
    const list = this.root.querySelector(".marks");
    widths.forEach((width, i) => {
      const share = (sizes[i] - size[0]) / span;
      if (width < 2 || width > 4 || share < 0 || share > 1) return;
      const mark = document.createElement("button");
      mark.type = "button";
      mark.className = "quiet";
      const word = document.createElement("span");
      word.textContent = "uniform ";
      mark.append(word, width);
      mark.title = `${bytes(sizes[i])}, predicted loss ${loss(this.maps.uniform_predicted_loss[i])} with ${width} bits everywhere`;
      mark.style.left = `clamp(2rem, ${100 * share}%, calc(100% - 2rem))`;
      mark.addEventListener("click", () => {
        this.value.value = this.rounded(this.inUnit(this.point(i, "uniform_")));
        this.typed();
      });
      list.append(mark);
    });
  }
}

const root = document.getElementById("budget");
const waiting = root.querySelector("[data-waiting]");
waiting.hidden = false;
try {
  const maps = await fetchArrays(root.dataset.maps);
  for (const part of root.querySelectorAll("[data-drawn]")) part.toggleAttribute("hidden");
  new Slider(root, new Model(maps), maps);
} catch (error) {
  const notice = document.getElementById("budget-error");
  notice.textContent = `The profile cannot be shown: ${error.message}`;
  notice.hidden = false;
}
waiting.hidden = true;
