// The groups of a model by the place of their linears: blocks by modules.

/** ["model.layers.3", "mlp.up_proj"]; experts of a layer share the module "mlp.experts.*.up_proj". */
export function splitName(name) {
  const parts = name.split(".");
  const place = parts.findIndex((part) => /^\d+$/.test(part));
  const module = parts.slice(place + 1).join(".").replace(/\.\d+\./g, ".*.");
  return [parts.slice(0, place + 1).join("."), module];
}

/** A module's name without what every model has in common. */
export function shortName(module) {
  return module.replace("self_attn.", "").replace("mlp.", "");
}

/**
 * names: of L linears; starts: first group of each, Int32Array [L+1]; cells[row][column]: numbers of
 * the linears there, or undefined; columns: width in columns of every group, Uint8Array [T].
 */
export class Model {
  constructor({ names, starts, shapes }) {
    this.names = JSON.parse(new TextDecoder().decode(names));
    this.starts = starts;
    this.shapes = shapes;
    this.groups = starts[starts.length - 1];
    this.blocks = [];
    this.modules = [];
    this.cells = [];
    const rows = new Map();
    const places = new Map();
    this.names.forEach((name, linear) => {
      const [block, module] = splitName(name);
      const row = placeIn(rows, this.blocks, block);
      const column = placeIn(places, this.modules, module);
      this.cells[row] ??= [];
      (this.cells[row][column] ??= []).push(linear);
    });
    this.columns = new Uint8Array(this.groups).fill(128);
    if (shapes) {
      this.names.forEach((_, linear) => {
        const tail = shapes[2 * linear + 1] % 128;
        if (tail) this.columns[starts[linear + 1] - 1] = tail;
      });
    }
  }

  /** Label of a row: the block's number. */
  label(row) {
    return this.blocks[row].split(".").pop() || "–";
  }

  /** Sum of a value of groups over these linears. */
  sum(linears, values) {
    let total = 0;
    for (const linear of linears)
      for (let g = this.starts[linear]; g < this.starts[linear + 1]; g++) total += values[g];
    return total;
  }

  /** Mean of a value of groups over these linears, by weights. */
  mean(linears, values) {
    let total = 0;
    let weights = 0;
    for (const linear of linears) {
      const rows = this.shapes ? this.shapes[2 * linear] : 1;
      for (let g = this.starts[linear]; g < this.starts[linear + 1]; g++) {
        total += rows * this.columns[g] * values[g];
        weights += rows * this.columns[g];
      }
    }
    return total / weights;
  }

  /** Mean of a value of linears. */
  meanOfLinears(linears, values) {
    return linears.reduce((total, linear) => total + values[linear], 0) / linears.length;
  }
}

function placeIn(known, list, name) {
  if (!known.has(name)) known.set(name, list.push(name) - 1);
  return known.get(name);
}
