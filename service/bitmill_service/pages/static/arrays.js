// Reads the API's typed arrays: a safetensors file, whose arrays are views of the bytes that came.
const TYPES = { U8: Uint8Array, I32: Int32Array, F32: Float32Array, F64: Float64Array };

/** name -> typed array, with its shape as `shape`; throws with the service's own words. */
export async function fetchArrays(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error((await answer.json()).detail ?? answer.statusText);
  return readArrays(await answer.arrayBuffer());
}

export function readArrays(bytes) {
  const length = Number(new DataView(bytes).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, length)));
  const found = {};
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    const type = TYPES[dtype];
    found[name] = new type(bytes, 8 + length + begin, (end - begin) / type.BYTES_PER_ELEMENT);
    found[name].shape = shape;
  }
  return found;
}
