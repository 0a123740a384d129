// Blocks by modules on one canvas: each cell has the colour of its linears, and below it a strip with
// the colours of their groups. Rows are drawn as one line of pixels each and stretched, so that the
// time does not grow with the height, and no element stands for a cell or a group.
import { shortName } from "./model.js";

const HEAD = 62;
const SIDE = 34;
const LEAST_COLUMN = 34;
const FONT = "11px system-ui, sans-serif";

/**
 * A view says what is shown: `name`, `unit`; `cell(linears)`: value of a cell; `groups`: value of
 * every group, or null; `scale` of cells, `groupScale` of groups; `text(value)`: a number for people.
 */
export class Heatmap {
  constructor(canvas, model, { onPoint, onOpen }) {
    this.canvas = canvas;
    this.model = model;
    this.onPoint = onPoint;
    this.onOpen = onOpen;
    this.at = { row: 0, column: 0 };
    canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event)));
    canvas.addEventListener("pointerleave", () => this.point(document.activeElement === canvas ? this.at : null));
    canvas.addEventListener("click", (event) => this.choose(this.cellAt(event)));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("focus", () => this.point(this.at));
    canvas.addEventListener("blur", () => this.mark(null));
    this.frame = canvas.parentElement.appendChild(document.createElement("div"));
    this.frame.className = "frame";
    this.frame.hidden = true;
    new ResizeObserver(() => {
      if (canvas.parentElement.clientWidth !== this.room) this.draw();
    }).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    new MutationObserver(() => this.draw()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  }

  show(view) {
    this.view = view;
    this.draw();
  }

  draw() {
    if (!this.view) return;
    this.measure();
    const { context, model, view } = this;
    const style = getComputedStyle(this.canvas);
    this.ink = style.color;
    this.ground = style.backgroundColor;
    context.fillStyle = this.ground;
    context.fillRect(0, 0, this.width, this.height);
    context.font = FONT;
    this.legend();
    this.labels();
    this.values = model.cells.map((row) => model.modules.map((_, c) => (row[c] ? view.cell(row[c]) : undefined)));
    this.bands();
    this.figures();
    this.mark(document.activeElement === this.canvas ? this.at : null);
  }

  measure() {
    const { blocks, modules } = this.model;
    const ratio = window.devicePixelRatio || 1;
    this.room = this.canvas.parentElement.clientWidth;
    this.column = Math.max(LEAST_COLUMN, Math.floor((this.room - SIDE) / modules.length));
    this.row = Math.max(12, Math.min(26, Math.floor(1400 / blocks.length)));
    this.width = SIDE + this.column * modules.length;
    this.height = HEAD + this.row * blocks.length;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    this.context = this.canvas.getContext("2d");
    this.context.scale(ratio, ratio);
    this.ratio = ratio;
  }

  legend() {
    const { context, view } = this;
    const { scale } = view;
    const left = SIDE;
    const wide = Math.min(260, this.width - SIDE - 2);
    for (let x = 0; x < wide; x++) {
      context.fillStyle = scale.css(Math.round((x / (wide - 1)) * 255));
      context.fillRect(left + x, 18, 1, 9);
    }
    context.fillStyle = this.ink;
    context.textAlign = "left";
    context.fillText(view.legend, left, 12, this.width - left);
    const ticks = scale.log ? [scale.low, Math.sqrt(scale.low * scale.high), scale.high] : [1, 2, 3, 4, 5, 6, 7, 8];
    ticks.forEach((value, i) => {
      context.textAlign = i === 0 ? "left" : i === ticks.length - 1 ? "right" : "center";
      context.fillText(scale.log ? view.text(value) : value, left + (wide * i) / (ticks.length - 1), 39);
    });
  }

  labels() {
    const { context, model } = this;
    context.fillStyle = this.ink;
    context.textAlign = "center";
    model.modules.forEach((module, column) => {
      context.fillText(this.fitted(shortName(module)), SIDE + (column + 0.5) * this.column, HEAD - 5);
    });
    context.textAlign = "right";
    const step = this.row >= 14 ? 1 : 2;
    for (let row = 0; row < model.blocks.length; row += step)
      context.fillText(model.label(row), SIDE - 6, HEAD + row * this.row + this.row / 2 + 4);
  }

  fitted(name) {
    const room = this.column - 3;
    const fits = (text) => this.context.measureText(text).width <= room;
    const shorter = [name, name.replace(/_proj$/, ""), name.split(".").pop().replace(/_proj$/, "")];
    let text = shorter.find(fits) ?? shorter[2];
    while (text.length > 1 && !fits(text)) text = text.slice(0, -1);
    return text;
  }

  bands() {
    const { context, model, view } = this;
    const wide = Math.round(this.column * this.ratio) - Math.round(this.ratio);
    const across = wide * model.modules.length;
    const strip = view.groups ? Math.max(4, Math.round(this.row * 0.3)) : 0;
    const cells = new Uint32Array(across * model.blocks.length);
    const groups = strip ? new Uint32Array(across * model.blocks.length) : null;
    this.values.forEach((row, r) => {
      row.forEach((value, c) => {
        if (value === undefined) return;
        const start = r * across + c * wide;
        cells.fill(view.scale.palette[view.scale.of(value)], start, start + wide);
        if (groups) this.groupPixels(groups, start, wide, model.cells[r][c]);
      });
    });
    const head = this.row - strip - (this.row < 18 ? 1 : 2);
    this.stretch(cells, across, wide, 0, head);
    if (groups) this.stretch(groups, across, wide, head, strip);
    context.imageSmoothingEnabled = true;
  }

  groupPixels(pixels, start, wide, linears) {
    const { starts } = this.model;
    const { groups, groupScale } = this.view;
    const { palette } = groupScale;
    const share = wide / linears.length;
    linears.forEach((linear, i) => {
      const [first, count] = [starts[linear], starts[linear + 1] - starts[linear]];
      const [from, to] = [Math.round(i * share), Math.round((i + 1) * share)];
      for (let x = from; x < to; x++) {
        const group = first + Math.floor(((x - from) * count) / (to - from));
        pixels[start + x] = palette[groupScale.of(groups[group])];
      }
    });
  }

  /** Draws a line of pixels per row and cell `high` tall, `down` below the row's top. */
  stretch(pixels, across, wide, down, high) {
    const { context, model } = this;
    const lines = new OffscreenCanvas(across, model.blocks.length);
    const image = new ImageData(new Uint8ClampedArray(pixels.buffer), across, model.blocks.length);
    lines.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    for (let row = 0; row < model.blocks.length; row++)
      for (let column = 0; column < model.modules.length; column++)
        if (model.cells[row][column])
          context.drawImage(lines, column * wide, row, wide, 1,
            SIDE + column * this.column, HEAD + row * this.row + down, wide / this.ratio, high);
  }

  figures() {
    const { context, view } = this;
    if (this.row < 18 || this.column < 40) return;
    context.textAlign = "center";
    const down = view.groups ? this.row * 0.35 + 3.5 : this.row / 2 + 3.5;
    this.values.forEach((row, r) => {
      row.forEach((value, c) => {
        if (value === undefined || Number.isNaN(value)) return;
        context.fillStyle = view.scale.ink(view.scale.of(value));
        context.fillText(view.text(value), SIDE + (c + 0.5) * this.column, HEAD + r * this.row + down);
      });
    });
  }

  /** Puts the frame around a cell, or takes it away. */
  mark(cell) {
    this.frame.hidden = !cell;
    if (!cell) return;
    this.frame.style.left = `${SIDE + cell.column * this.column - 2}px`;
    this.frame.style.top = `${HEAD + cell.row * this.row - 2}px`;
    this.frame.style.width = `${this.column + 3}px`;
    this.frame.style.height = `${this.row + 3}px`;
  }

  point(cell) {
    this.mark(cell);
    if (cell) this.onPoint(cell, this.values[cell.row][cell.column]);
  }

  choose(cell) {
    if (!cell) return;
    this.at = cell;
    this.point(cell);
    this.onOpen(cell);
  }

  cellAt(event) {
    const row = Math.floor((event.offsetY - HEAD) / this.row);
    const column = Math.floor((event.offsetX - SIDE) / this.column);
    return this.model.cells[row]?.[column] ? { row, column } : null;
  }

  key(event) {
    const last = this.model.blocks.length - 1;
    const { row, column } = this.at;
    if (event.key === "Enter" || event.key === " ") this.onOpen(this.at);
    else if (event.key === "ArrowUp" && row > 0) this.toRow(row - 1);
    else if (event.key === "ArrowDown" && row < last) this.toRow(row + 1);
    else if (event.key === "Home") this.toRow(0);
    else if (event.key === "End") this.toRow(last);
    else if (event.key === "ArrowLeft") this.toColumn(column, -1);
    else if (event.key === "ArrowRight") this.toColumn(column, 1);
    else return;
    event.preventDefault();
  }

  /** To the cell of a row that is nearest to where we are; every row has one. */
  toRow(row) {
    const columns = Object.keys(this.model.cells[row]).map(Number);
    const away = (column) => Math.abs(column - this.at.column);
    this.to(row, columns.reduce((best, column) => (away(column) < away(best) ? column : best)));
  }

  /** To the next cell of the row in a direction; stays where there is none. */
  toColumn(column, step) {
    const cells = this.model.cells[this.at.row];
    do column += step;
    while (column in this.model.modules && !cells[column]);
    if (cells[column]) this.to(this.at.row, column);
  }

  to(row, column) {
    this.at = { row, column };
    this.point(this.at);
  }
}
