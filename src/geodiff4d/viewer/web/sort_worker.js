// Orders the splats from far to near, away from the page's own thread: the depth of each from its triangle, then a
// counting sort by 16 bits of depth.

const KEYS = 65536;
let faces, face, means, keys, depths, slots, counts;

onmessage = ({ data }) => {
  if (data.faces) {
    ({ faces, face, means } = data);
    keys = new Uint16Array(face.length);
    depths = new Float32Array(face.length);
    counts = new Uint32Array(KEYS + 1);
    slots = new Float32Array((faces.length / 3) * 4);
    return;
  }
  const began = performance.now();
  const order = sorted(data.vertices, data.toward, data.order);
  const ms = performance.now() - began;
  postMessage({ order, vertices: data.vertices, ms, number: data.number }, [order.buffer, data.vertices.buffer]);
};

// `toward` is the camera's third row: depth = toward · point + toward[3].
function sorted(v, toward, order) {
  depthOfFaces(v, toward);
  const n = face.length;
  let low = Infinity, high = -Infinity;
  for (let i = 0; i < n; i++) {
    const s = 4 * face[i], m = 3 * i;
    const z = slots[s] * means[m] + slots[s + 1] * means[m + 1] + slots[s + 2] * means[m + 2] + slots[s + 3];
    depths[i] = z;
    if (z < low) low = z;
    if (z > high) high = z;
  }
  const scale = (KEYS - 1) / Math.max(high - low, 1e-9);
  counts.fill(0);
  for (let i = 0; i < n; i++) {
    keys[i] = (high - depths[i]) * scale;
    counts[keys[i] + 1]++;
  }
  for (let k = 1; k < KEYS; k++) counts[k] += counts[k - 1];
  for (let i = 0; i < n; i++) order[counts[keys[i]]++] = i;
  return order;
}

// Of each triangle: how depth changes along its frame's axes (times its size), and its centre's depth.
function depthOfFaces(v, [a, b, c, d]) {
  for (let f = 0, s = 0; f < faces.length; f += 3, s += 4) {
    const p = 3 * faces[f], q = 3 * faces[f + 1], r = 3 * faces[f + 2];
    const ex = v[q] - v[p], ey = v[q + 1] - v[p + 1], ez = v[q + 2] - v[p + 2];
    const gx = v[r] - v[p], gy = v[r + 1] - v[p + 1], gz = v[r + 2] - v[p + 2];
    const e = Math.sqrt(ex * ex + ey * ey + ez * ez), ie = 1 / Math.max(e, 1e-12);
    const x0 = ex * ie, y0 = ey * ie, z0 = ez * ie;
    let x1 = y0 * gz - z0 * gy, y1 = z0 * gx - x0 * gz, z1 = x0 * gy - y0 * gx;
    const height = Math.sqrt(x1 * x1 + y1 * y1 + z1 * z1), ih = 1 / Math.max(height, 1e-12);
    x1 *= ih; y1 *= ih; z1 *= ih;
    const x2 = -(y1 * z0 - z1 * y0), y2 = -(z1 * x0 - x1 * z0), z2 = -(x1 * y0 - y1 * x0);
    const k = 0.5 * (e + height);
    slots[s] = k * (a * x0 + b * y0 + c * z0);
    slots[s + 1] = k * (a * x1 + b * y1 + c * z1);
    slots[s + 2] = k * (a * x2 + b * y2 + c * z2);
    slots[s + 3] = d + (a * (v[p] + v[q] + v[r]) + b * (v[p + 1] + v[q + 1] + v[r + 1])
      + c * (v[p + 2] + v[q + 2] + v[r + 2])) / 3;
  }
}
