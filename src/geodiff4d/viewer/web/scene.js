// Reads the avatar that the page carries: base64, deflate, a JSON header, then columns of numbers (viewer/scene.py).

async function readScene(text) {
  const bytes = await inflated(text);
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const about = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const data = bytes.subarray(4 + length);
  const arrays = {};
  for (const [name, one] of Object.entries(about.arrays)) arrays[name] = { ...one, ...readArray(data, one) };
  return { ...about, arrays };
}

// The bytes behind base64 of what zlib compressed.
async function inflated(text) {
  const packed = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Values lie column by column, all low bytes before all high ones; they are returned row by row.
function readArray(data, { kind, rows, width, bytes, at, low, step }) {
  const count = rows * width;
  const raw = new Uint8Array(count * bytes);
  for (let b = 0; b < bytes; b++)
    for (let i = 0; i < count; i++) raw[i * bytes + b] = data[at + b * count + i];
  const Type = kind === "numbers" ? Float32Array : bytes === 2 ? Uint16Array : Uint8Array;
  const columns = new Type(raw.buffer);
  const codes = new Type(count);
  for (let c = 0; c < width; c++) {
    let sum = 0;
    for (let r = 0; r < rows; r++) {
      const value = columns[c * rows + r];
      codes[r * width + c] = kind === "indices" ? (sum = (sum + value) & 0xffff) : value;
    }
  }
  if (kind !== "columns") return { codes, values: codes };
  const values = new Float32Array(count);
  for (let i = 0; i < count; i++) values[i] = low[i % width] + step[i % width] * codes[i];
  return { codes, values };
}
