// Size against predicted loss, logarithmic upwards: the curve, its trust range, uniform maps, a dot.
import { bytes, loss } from "./numbers.js";

const SPACE = "http://www.w3.org/2000/svg";
const [HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [300, 64, 16, 12, 40];

export class Curve {
  constructor(svg, maps, [low, high]) {
    this.svg = svg;
    this.width = Math.max(320, Math.min(640, svg.clientWidth));
    svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    const losses = Array.from(maps.predicted_loss).filter((value) => value > 0);
    const uniform = Array.from(maps.uniform_predicted_loss);
    this.sizes = [maps.size[0], maps.size[maps.size.length - 1]];
    this.logs = [
      Math.log10(low * Math.min(...losses)),
      Math.log10(Math.max(high * Math.max(...losses), ...uniform)),
    ];
    this.axes();
    const line = (factor) => Array.from(maps.size, (size, i) => this.at(size, factor * maps.predicted_loss[i]));
    this.add("polygon", { class: "trust", points: [...line(low), ...line(high).reverse()].join(" ") });
    this.add("polyline", { class: "line", points: line(1).join(" ") });
    maps.uniform_widths.forEach((width, i) => {
      if (maps.uniform_size[i] > this.sizes[1]) return;
      const [x, y] = this.at(maps.uniform_size[i], uniform[i]);
      this.add("path", { class: "uniform", d: `M${x - 4} ${y - 4}l8 8m0-8l-8 8` });
      const toLeft = x > this.width - 90;
      this.add("text", { x: x + (toLeft ? -8 : 8), y: y - 6, "text-anchor": toLeft ? "end" : "start" }, `uniform ${width}`);
    });
    this.dot = this.add("circle", { class: "dot", r: 7 });
  }

  place(point) {
    const [x, y] = this.at(point.size, point.predicted_loss);
    this.dot.setAttribute("cx", x);
    this.dot.setAttribute("cy", y);
  }

  at(size, value) {
    const across = (size - this.sizes[0]) / (this.sizes[1] - this.sizes[0] || 1);
    const up = (Math.log10(Math.max(value, 1e-12)) - this.logs[0]) / (this.logs[1] - this.logs[0] || 1);
    return [LEFT + across * (this.width - LEFT - RIGHT), TOP + (1 - Math.max(0, up)) * (HEIGHT - TOP - BOTTOM)];
  }

  axes() {
    for (let power = Math.ceil(this.logs[0]); power <= this.logs[1]; power++) {
      const [, y] = this.at(this.sizes[0], 10 ** power);
      this.add("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y });
      this.add("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, loss(10 ** power));
    }
    for (let i = 0; i <= 4; i++) {
      const size = this.sizes[0] + (i / 4) * (this.sizes[1] - this.sizes[0]);
      const [x] = this.at(size, 1);
      const anchor = i === 0 ? "start" : i === 4 ? "end" : "middle";
      this.add("text", { x, y: HEIGHT - BOTTOM + 16, "text-anchor": anchor }, bytes(size));
    }
    this.add("text", { x: (LEFT + this.width - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, "size of all files");
    const side = `translate(12 ${(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)`;
    this.add("text", { transform: side, "text-anchor": "middle" }, "predicted loss, nats a token");
  }

  add(kind, attributes, text) {
    const made = document.createElementNS(SPACE, kind);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return this.svg.appendChild(made);
  }
}
