// The groups of one linear: what it is, how many groups have each width, and a table of all of them.
import { widthScale } from "./colours.js";
import { bytes, figure, loss } from "./numbers.js";

export class GroupPanel {
  constructor(root, model, arrays) {
    this.root = root;
    this.model = model;
    this.arrays = arrays;
    this.title = root.querySelector("h2");
    this.choice = root.querySelector("select");
    this.choice.addEventListener("change", () => this.show(Number(this.choice.value)));
    root.querySelector("[data-close]").addEventListener("click", () => this.close());
  }

  /** Shows the first of these linears; the others, a layer's experts, can be chosen. */
  open(linears) {
    this.before = document.activeElement;
    this.choice.parentElement.hidden = linears.length < 2;
    this.choice.replaceChildren(...linears.map((linear) => new Option(this.model.names[linear], linear)));
    this.root.hidden = false;
    this.show(linears[0]);
    this.title.focus();
    this.root.scrollIntoView({ block: "nearest" });
  }

  openNamed(name) {
    const linear = this.model.names.indexOf(name);
    if (linear >= 0) this.open([linear]);
  }

  close() {
    this.root.hidden = true;
    history.replaceState(null, "", location.pathname + location.search);
    this.before?.focus();
  }

  show(linear) {
    const { model, arrays } = this;
    const [first, last] = [model.starts[linear], model.starts[linear + 1]];
    this.title.textContent = model.names[linear];
    history.replaceState(null, "", `#${encodeURIComponent(model.names[linear])}`);
    const facts = [["Groups", last - first], ["Mean width", figure(model.mean([linear], arrays.widths))]];
    if (model.shapes) facts.unshift(["Rows × columns", `${model.shapes[2 * linear]} × ${model.shapes[2 * linear + 1]}`]);
    if (arrays.bytes) facts.push(["Stored", bytes(model.sum([linear], arrays.bytes))]);
    if (arrays.error) facts.push(["Relative error", loss(arrays.error[linear])]);
    if (arrays.predicted_loss) facts.push(["Predicted loss", `${loss(arrays.predicted_loss[linear])} nats a token`]);
    const counts = new Map();
    for (let g = first; g < last; g++) counts.set(arrays.widths[g], (counts.get(arrays.widths[g]) ?? 0) + 1);
    const spread = [...counts].sort((a, b) => a[0] - b[0]).map(([width, count]) => `${count} of ${width}`);
    facts.push(["Widths", `${spread.join(", ")} bits`]);
    this.root.querySelector("dl").replaceChildren(...facts.map(([name, value]) => fact(name, value)));
    this.strip(arrays.widths.subarray(first, last));
    this.rows(first, last);
  }

  /** All groups side by side, in column order. */
  strip(widths) {
    const canvas = this.root.querySelector("canvas");
    canvas.width = widths.length;
    canvas.height = 1;
    const scale = widthScale();
    const pixels = Uint32Array.from(widths, (width) => scale.palette[scale.of(width)]);
    const image = new ImageData(new Uint8ClampedArray(pixels.buffer), widths.length, 1);
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  rows(first, last) {
    const { model, arrays } = this;
    const heads = ["Group", "Columns", "Width"];
    if (arrays.bytes) heads.push("Bytes");
    if (arrays.sensitivity) heads.push(`Loss at ${arrays.reference_width[0]} bits`);
    this.root.querySelector("thead tr").replaceChildren(...heads.map((name) => cell("th", name)));
    const rows = [];
    for (let g = first; g < last; g++) {
      const start = 128 * (g - first);
      const values = [g - first, `${start}–${start + model.columns[g] - 1}`, arrays.widths[g]];
      if (arrays.bytes) values.push(arrays.bytes[g]);
      if (arrays.sensitivity) values.push(loss(arrays.sensitivity[g]));
      const row = document.createElement("tr");
      row.append(...values.map((value) => cell("td", value)));
      rows.push(row);
    }
    this.root.querySelector("tbody").replaceChildren(...rows);
  }
}

function cell(kind, text) {
  const made = document.createElement(kind);
  made.className = "number";
  if (kind === "th") made.scope = "col";
  made.textContent = text;
  return made;
}

function fact(name, value) {
  const made = document.createElement("div");
  const [term, told] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = name;
  told.textContent = value;
  made.append(term, told);
  return made;
}
