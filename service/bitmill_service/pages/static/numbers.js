// Numbers for people.

/** Two digits after the point. */
export const figure = (value) => (Number.isNaN(value) ? "–" : value.toFixed(2));

/** Two significant digits: losses and errors run over decades. */
export const loss = (value) => {
  if (Number.isNaN(value)) return "–";
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : String(+value.toPrecision(2));
};

/** Bytes in decimal units. */
export function bytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000 || unit === "GB") return `${unit === "B" ? count : count.toPrecision(3)} ${unit}`;
    count /= 1000;
  }
}
