// The head: weights and joint angles to posed vertices, as heads/rig.py has it. Morph targets are sparse; joints move
// with the expression; skinning is linear. Joints: root, neck, jaw, left eye, right eye.

const PARENTS = [-1, 0, 1, 1, 1];

class Rig {
  constructor(scene) {
    const value = (name) => scene.arrays[name].values;
    this.names = scene.names;
    this.expressions = scene.names.length;
    this.vertexCount = scene.arrays.neutral.rows;
    this.neutral = value("neutral");
    this.skin = value("skin");
    this.joints = value("joints");
    this.jointMorphs = value("joint_morphs");
    this.gaze = value("gaze");
    this.morphIndex = value("morph_index");
    this.morphOffsets = value("morph_offsets");
    this.morphStart = [0];
    for (const count of value("morph_counts")) this.morphStart.push(this.morphStart.at(-1) + count);
    this.shaped = new Float32Array(3 * this.vertexCount);
    this.vertices = new Float32Array(3 * this.vertexCount);
  }

  // `row` is a pose as the scene stores them: expression, rotation, neck, jaw, eyes (6), translation.
  pose(row) {
    const E = this.expressions;
    const joints = this.morph(row);
    const transforms = this.transforms(row, joints);
    for (let j = 0; j < transforms.length; j++)
      for (let i = 0; i < 3; i++) transforms[j][4 * i + 3] += row[E + 15 + i];
    this.move(transforms);
    return this.vertices;
  }

  // Moves the neutral vertices by the expression; returns the joints' rest positions under it.
  morph(row) {
    const { shaped, morphIndex: index, morphOffsets: offsets } = this;
    const joints = Float64Array.from(this.joints);
    shaped.set(this.neutral);
    for (let k = 0; k < this.expressions; k++) {
      const w = row[k];
      if (Math.abs(w) < 1e-6) continue;
      for (let i = this.morphStart[k], end = this.morphStart[k + 1]; i < end; i++) {
        const v = 3 * index[i], o = 3 * i;
        shaped[v] += w * offsets[o];
        shaped[v + 1] += w * offsets[o + 1];
        shaped[v + 2] += w * offsets[o + 2];
      }
      for (let i = 0; i < joints.length; i++) joints[i] += w * this.jointMorphs[k * joints.length + i];
    }
    return joints;
  }

  transforms(row, joints) {
    const E = this.expressions;
    const angles = Array.from(row.slice(E, E + 15));
    for (let c = 0; c < 6; c++) {
      let asked = 0;
      for (let k = 0; k < E; k++) asked += row[k] * this.gaze[6 * k + c];
      angles[9 + c] = either(angles[9 + c], asked);
    }
    const out = [];
    for (let j = 0; j < PARENTS.length; j++) {
      const about = rotationAbout(angles.slice(3 * j, 3 * j + 3), joints.subarray(3 * j, 3 * j + 3));
      out.push(PARENTS[j] < 0 ? about : multiply(out[PARENTS[j]], about));
    }
    return out;
  }

  move(transforms) {
    const { shaped, vertices, skin } = this;
    const J = transforms.length;
    const flat = Float64Array.from(transforms.flatMap((t) => Array.from(t)));
    for (let v = 0; v < this.vertexCount; v++) {
      const x = shaped[3 * v], y = shaped[3 * v + 1], z = shaped[3 * v + 2];
      let a = 0, b = 0, c = 0;
      for (let j = 0; j < J; j++) {
        const w = skin[J * v + j], t = 12 * j;
        if (w === 0) continue;
        a += w * (flat[t] * x + flat[t + 1] * y + flat[t + 2] * z + flat[t + 3]);
        b += w * (flat[t + 4] * x + flat[t + 5] * y + flat[t + 6] * z + flat[t + 7]);
        c += w * (flat[t + 8] * x + flat[t + 9] * y + flat[t + 10] * z + flat[t + 11]);
      }
      vertices[3 * v] = a;
      vertices[3 * v + 1] = b;
      vertices[3 * v + 2] = c;
    }
  }
}

// One motion out of two that may both describe it: the larger where their signs agree, else their sum.
function either(a, b) {
  return a * b > 0 ? (Math.abs(a) > Math.abs(b) ? a : b) : a + b;
}

// Rigid transforms are 3×4 matrices, row by row.
function rotationAbout(axisAngle, point) {
  const R = rotation(axisAngle);
  const out = new Float64Array(12);
  for (let i = 0; i < 3; i++) {
    let moved = 0;
    for (let k = 0; k < 3; k++) {
      out[4 * i + k] = R[3 * i + k];
      moved += R[3 * i + k] * point[k];
    }
    out[4 * i + 3] = point[i] - moved;
  }
  return out;
}

function rotation([x, y, z]) {
  const angle = Math.hypot(x, y, z);
  const s = angle < 1e-8 ? 1 : Math.sin(angle) / angle;
  const c = angle < 1e-8 ? 0.5 : (1 - Math.cos(angle)) / (angle * angle);
  return [
    1 - c * (y * y + z * z), c * x * y - s * z, c * x * z + s * y,
    c * x * y + s * z, 1 - c * (x * x + z * z), c * y * z - s * x,
    c * x * z - s * y, c * y * z + s * x, 1 - c * (x * x + y * y),
  ];
}

function multiply(a, b) {
  const out = new Float64Array(12);
  for (let i = 0; i < 3; i++)
    for (let k = 0; k < 4; k++) {
      let sum = k === 3 ? a[4 * i + 3] : 0;
      for (let m = 0; m < 3; m++) sum += a[4 * i + m] * b[4 * m + k];
      out[4 * i + k] = sum;
    }
  return out;
}
