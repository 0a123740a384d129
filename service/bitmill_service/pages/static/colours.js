// Viridis: its order is kept by colour-blind eyes and in grey. The same colours as in reports, from
// black for dropped groups, of width 0, to 8 bits.
const WIDTHS = ["#000000", "#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#c8e020", "#fde725"];
const SCALE = ["#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725"];
const STEPS = 256;
/** Number of the colour for "not known". */
export const NONE = STEPS;

/** A scale from values to numbers of colours: `of(value)`; `palette`: colours as RGBA in a Uint32Array. */
class Scale {
  constructor(stops, low, high, log) {
    this.palette = palette(stops);
    this.low = low;
    this.high = high;
    this.log = log;
    this.from = log ? Math.log(low) : low;
    this.span = (log ? Math.log(high) : high) - this.from || 1;
  }

  of(value) {
    if (!(value > 0)) return Number.isNaN(value) ? NONE : 0;
    const share = ((this.log ? Math.log(value) : value) - this.from) / this.span;
    return Math.max(0, Math.min(STEPS - 1, Math.round(share * (STEPS - 1))));
  }

  css(number) {
    const value = this.palette[number];
    return `rgb(${value & 255} ${(value >> 8) & 255} ${(value >> 16) & 255})`;
  }

  /** Black or white, whichever reads better on a colour. */
  ink(number) {
    const value = this.palette[number];
    const light = 0.299 * (value & 255) + 0.587 * ((value >> 8) & 255) + 0.114 * ((value >> 16) & 255);
    return light > 0.4 * 255 ? "#000" : "#fff";
  }
}

export const widthScale = () => new Scale(WIDTHS, 0, WIDTHS.length - 1, false);

/** Colours by logarithm between the smallest and the largest positive value. */
export function logScale(values) {
  let low = Infinity;
  let high = 0;
  for (const value of values) {
    if (value > 0 && value < low) low = value;
    if (value > high) high = value;
  }
  return new Scale(SCALE, low === Infinity ? 1 : low, high || 1, true);
}

function palette(stops) {
  const colours = new Uint32Array(STEPS + 1);
  for (let i = 0; i < STEPS; i++) {
    const at = (i / (STEPS - 1)) * (stops.length - 1);
    const first = Math.min(Math.floor(at), stops.length - 2);
    const [a, b] = [channels(stops[first]), channels(stops[first + 1])];
    const mixed = a.map((value, channel) => Math.round(value + (b[channel] - value) * (at - first)));
    colours[i] = rgba(mixed);
  }
  colours[NONE] = rgba([128, 128, 128]);
  return colours;
}

const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
// Little-endian, as on every machine that has a browser today.
const rgba = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
