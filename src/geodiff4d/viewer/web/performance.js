// What the head does by itself: the fitted sequence, or weights out of a file, a row of pose numbers per frame.

const NOT_WEIGHTS = new Set(["time", "timecode", "frame", "rotation", "translation"]);
const SLACK = 1e-3;
const BELOW = 0.05;

class Performance {
  constructor(rows, width, fps) {
    Object.assign(this, { rows, width, fps, frames: rows.length / width });
  }

  frame(index) {
    return this.rows.slice(index * this.width, (index + 1) * this.width);
  }

  // The pose at a time in seconds, between the two frames next to it; it starts again at its end.
  at(seconds) {
    const place = (seconds * this.fps) % this.frames;
    const first = Math.floor(place), share = place - first;
    const row = this.frame(first);
    if (first + 1 >= this.frames) return row;
    const next = (first + 1) * this.width;
    for (let i = 0; i < row.length; i++) row[i] += share * (this.rows[next + i] - row[i]);
    return row;
  }
}

// Weights (0 to 1) and a turn of the neck, put on a pose: 0 leaves it, 1 is the whole expression, as avatar/drive.py's
// `held` has it.
function withWeights(base, weights, neck = [0, 0, 0], jaw = [0, 0, 0], body = [0, 0, 0]) {
  const E = weights.length;
  const row = base.slice();
  for (let k = 0; k < E; k++)
    if (weights[k]) row[k] = Math.min(1, Math.max(-BELOW, base[k] + weights[k] * (1 - base[k])));
  for (let i = 0; i < 3; i++) {
    row[E + i] += body[i];
    row[E + 3 + i] += neck[i];
    row[E + 6 + i] += jaw[i];
  }
  return row;
}

// Reads ARKit weights, one JSON object a line, or one object with `frames` (avatar/stream.py). Returns frames of
// {weights, neck}; throws an Error that names the line.
function readLines(text, names) {
  const reader = new LineReader(names);
  const whole = wholeFile(text);
  if (whole)
    return whole.frames.map((frame, i) => reader.record(whole.names ? { names: whole.names, ...frame } : frame, `frame ${i + 1}`));
  const frames = [];
  text.replace(/^\ufeff/, "").split(/\r?\n/).forEach((line, i) => {
    if (!line.trim()) return;
    let value;
    try { value = JSON.parse(line); } catch { throw new Error(`line ${i + 1} is not JSON: expected one object a line`); }
    frames.push(reader.record(value, `line ${i + 1}`));
  });
  if (!frames.length) throw new Error("the file has no frames: expected one JSON object a line");
  return frames;
}

// Reads a table of weights, as Live Link Face records it (avatar/arkit_csv.py); returns {frames, fps}.
const NO_WEIGHT_COLUMN = /^(timecode|time|timestamp|frame|blendshapecount|(head|lefteye|righteye)(yaw|pitch|roll))$/i;

function readTable(text, names) {
  const rows = text.replace(/^\ufeff/, "").split(/\r?\n/).map((row) => row.split(",").map((word) => word.trim()));
  const head = rows[0], reader = new LineReader(names), frames = [], seconds = new Map();
  const used = head.map((word, i) => [word, i]).filter(([word]) => word && !NO_WEIGHT_COLUMN.test(word));
  if (!used.some(([word]) => reader.places.has(word.toLowerCase())))
    throw new Error("the table has no column of an ARKit expression: expected Timecode, BlendshapeCount, EyeBlinkLeft, …");
  const clock = head.findIndex((word) => /^timecode$/i.test(word));
  rows.slice(1).forEach((row, i) => {
    const where = `line ${i + 2}`;
    if (row.every((word) => !word)) return;
    if (row.length !== head.length) throw new Error(`${where} has ${row.length} columns, expected ${head.length}`);
    frames.push(reader.record(Object.fromEntries(used.map(([word, k]) => [word, row[k] === "" ? NaN : Number(row[k])])), where));
    const second = row[clock]?.match(/^\d+:\d+:\d+/)?.[0];
    if (second) seconds.set(second, (seconds.get(second) ?? 0) + 1);
  });
  if (!frames.length) throw new Error("the table has no frames");
  const whole = [...seconds.values()].slice(1, -1).sort((a, b) => a - b);
  const fps = whole[whole.length >> 1] ?? 0;
  return { frames, fps: fps >= 1 && fps <= 240 ? fps : null };
}

function wholeFile(text) {
  if (!text.includes('"frames"')) return null;
  try {
    const value = JSON.parse(text);
    return value && Array.isArray(value.frames) ? value : null;
  } catch { return null; }
}

class LineReader {
  constructor(names) {
    this.names = names;
    this.places = new Map(names.map((name, i) => [name.toLowerCase(), i]));
    this.order = names.map((_, i) => i);
  }

  record(value, where) {
    if (value === null || typeof value !== "object" || Array.isArray(value))
      throw new Error(`${where} is no object: expected one such as {"jawOpen": 0.4}`);
    const weights = new Float32Array(this.names.length);
    const { neck = [0, 0, 0], names, weights: list, ...named } = value;
    if (!Array.isArray(neck) || neck.length !== 3 || !neck.every((v) => Number.isFinite(v) && Math.abs(v) <= Math.PI))
      throw new Error(`${where} has a neck that is not three numbers within ±3.14`);
    if (names !== undefined) this.order = this.list(names, where, "names").map((name) => this.place(name, where));
    if (list !== undefined) {
      if (this.list(list, where, "weights").length !== this.order.length)
        throw new Error(`${where} has ${list.length} weights: expected ${this.order.length}`);
      this.order.forEach((place, i) => { weights[place] = this.weight(list[i], where, this.names[place]); });
    }
    for (const [name, weight] of Object.entries(named))
      if (!NOT_WEIGHTS.has(name)) weights[this.place(name, where)] = this.weight(weight, where, name);
    return { weights, neck };
  }

  list(value, where, what) {
    if (!Array.isArray(value)) throw new Error(`${where} has ${what} that are not a list`);
    return value;
  }

  place(name, where) {
    const place = this.places.get(String(name).toLowerCase());
    if (place === undefined) throw new Error(`${where} names “${String(name).slice(0, 40)}”, which is no expression of this head`);
    return place;
  }

  weight(value, where, name) {
    if (typeof value !== "number" || !(value >= -SLACK && value <= 1 + SLACK))
      throw new Error(`${where} has ${String(name).slice(0, 40)} = ${String(value).slice(0, 40)}: expected a number from 0 to 1`);
    return Math.min(1, Math.max(0, value));
  }
}
