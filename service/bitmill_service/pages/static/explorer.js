// The map explorer of a job: colours, the groups of a linear, a table and files of the same numbers.
import { fetchArrays } from "./arrays.js";
import { logScale, widthScale } from "./colours.js";
import { save } from "./files.js";
import { GroupPanel } from "./groups.js";
import { Heatmap } from "./heatmap.js";
import { Model } from "./model.js";
import { bytes, figure, loss } from "./numbers.js";

/** What can be shown of these arrays, by name. */
function viewsOf(model, arrays) {
  const views = {
    width: {
      legend: "mean width in bits; below it the width of every group",
      cell: (linears) => model.mean(linears, arrays.widths),
      groups: arrays.widths,
      scale: widthScale(),
      text: figure,
    },
  };
  if (arrays.sensitivity) {
    views.sensitivity = {
      legend: `predicted loss at ${arrays.reference_width[0]} bits, nats a token; below it every group's`,
      cell: (linears) => model.sum(linears, arrays.sensitivity),
      groups: arrays.sensitivity,
      text: loss,
    };
  }
  if (arrays.error) {
    views.error = {
      legend: "relative error of the refined linear",
      cell: (linears) => model.meanOfLinears(linears, arrays.error),
      groups: null,
      text: loss,
    };
  }
  if (arrays.bytes) {
    views.bytes = {
      legend: "stored bytes; below it every group's",
      cell: (linears) => model.sum(linears, arrays.bytes),
      groups: arrays.bytes,
      text: bytes,
    };
  }
  for (const view of Object.values(views)) {
    view.scale ??= logScale(model.cells.flatMap((row) => row.filter(Boolean).map(view.cell)));
    view.groupScale = view === views.width ? view.scale : view.groups && logScale(view.groups);
  }
  return views;
}

class Explorer {
  constructor(root, model, arrays) {
    this.root = root;
    this.model = model;
    this.views = viewsOf(model, arrays);
    this.arrays = arrays;
    this.table = document.getElementById("map-table");
    this.reading = root.querySelector("[data-reading]");
    this.panel = new GroupPanel(document.getElementById("groups"), model, arrays);
    this.heatmap = new Heatmap(root.querySelector("canvas"), model, {
      onPoint: (cell) => this.read(cell),
      onOpen: (cell) => this.open(cell.row, cell.column),
    });
    for (const choice of root.querySelectorAll("[name=colour]")) {
      choice.disabled = !this.views[choice.value];
      choice.parentElement.title = choice.disabled ? "Not measured, or its profile is gone" : "";
      choice.addEventListener("change", () => this.show(choice.value));
    }
    root.querySelector("[data-save=csv]").addEventListener("click", () => this.saveCsv());
    root.querySelector("[data-save=json]").addEventListener("click", () => this.saveJson());
    root.querySelector("[data-save=png]").addEventListener("click", () => this.savePng());
    this.table.addEventListener("toggle", () => this.fill());
    this.show(root.querySelector("[name=colour]:checked").value);
  }

  show(name) {
    this.shown = name;
    this.heatmap.show(this.views[name]);
    this.fill();
  }

  read({ row, column }) {
    const linears = this.model.cells[row][column];
    const values = Object.entries(this.views).map(([name, view]) => `${name} ${view.text(view.cell(linears))}`);
    const many = linears.length > 1 ? ` (${linears.length} linears)` : "";
    const place = this.model.blocks[row] ? `${this.model.blocks[row]}.` : "";
    this.reading.textContent = `${place}${this.model.modules[column]}${many}: ${values.join(", ")}`;
  }

  open(row, column) {
    this.panel.open(this.model.cells[row][column]);
  }

  /** The table shows what the colours show; its cells are in the model's order. */
  fill() {
    if (!this.table.open) return;
    const view = this.views[this.shown];
    this.table.querySelector("caption").textContent = view.legend.split(";")[0];
    const rows = this.table.querySelectorAll("tbody tr");
    this.model.cells.forEach((cells, row) => {
      const places = rows[row].querySelectorAll("td");
      this.model.modules.forEach((_, column) => {
        if (cells[column]) places[column].textContent = view.text(view.cell(cells[column]));
      });
    });
  }

  get name() {
    return `map-${this.root.dataset.job}`;
  }

  saveCsv() {
    const { model, arrays } = this;
    const known = ["bytes", "sensitivity"].filter((name) => arrays[name]);
    const lines = [["linear", "group", "first_column", "columns", "width", ...known].join()];
    model.names.forEach((name, linear) => {
      for (let g = model.starts[linear]; g < model.starts[linear + 1]; g++) {
        const group = g - model.starts[linear];
        const values = known.map((one) => arrays[one][g]);
        lines.push([name, group, 128 * group, model.columns[g], arrays.widths[g], ...values].join());
      }
    });
    save(`${this.name}.csv`, new Blob([lines.join("\n"), "\n"], { type: "text/csv" }));
  }

  saveJson() {
    const { model, arrays } = this;
    const linears = Object.fromEntries(
      model.names.map((name, linear) => {
        const part = (array) => array && Array.from(array.subarray(model.starts[linear], model.starts[linear + 1]));
        const whole = (array) => (array && !Number.isNaN(array[linear]) ? array[linear] : undefined);
        const found = { widths: part(arrays.widths), bytes: part(arrays.bytes), sensitivity: part(arrays.sensitivity) };
        const [rows, columns] = model.shapes ? model.shapes.subarray(2 * linear, 2 * linear + 2) : [];
        return [name, { rows, columns, error: whole(arrays.error), predicted_loss: whole(arrays.predicted_loss), ...found }];
      }),
    );
    const content = { job: this.root.dataset.job, reference_width: arrays.reference_width?.[0], linears };
    save(`${this.name}.json`, new Blob([JSON.stringify(content), "\n"], { type: "application/json" }));
  }

  savePng() {
    this.heatmap.canvas.toBlob((blob) => save(`${this.name}-${this.shown}.png`, blob));
  }
}

const root = document.getElementById("explorer");
document.getElementById("map-table").open = false;
try {
  const arrays = await fetchArrays(root.dataset.groups);
  root.hidden = false;
  const explorer = new Explorer(root, new Model(arrays), arrays);
  requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("map-painted")));
  explorer.panel.openNamed(decodeURIComponent(location.hash.slice(1)));
} catch (error) {
  document.getElementById("map-table").open = true;
  const notice = document.getElementById("map-error");
  notice.textContent = `The map cannot be drawn: ${error.message}`;
  notice.hidden = false;
}
