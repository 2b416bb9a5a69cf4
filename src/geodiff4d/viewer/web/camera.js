// Cameras: OpenCV's axes (x right, y down, z forward), world to camera, as core/camera.py and viewer/live_renderer.py
// have them.

const MAX_PITCH_DEG = 80;
const ZOOM = [0.3, 3];

// The avatar's own camera swung around the head: yaw about the world's y, then pitch about the camera's x; zoom is the
// distance in units of the camera's own. Returns a 3×4 matrix.
function orbited(camera, { yaw, pitch, zoom }) {
  const T = Float64Array.from(camera.T_cam_world.slice(0, 12));
  const rad = Math.PI / 180;
  const turn = rotationAbout([0, -yaw * rad, 0], camera.pivot);
  const lift = rotationAbout([T[0] * pitch * rad, T[1] * pitch * rad, T[2] * pitch * rad], camera.pivot);
  const out = multiply(T, multiply(lift, turn));
  const away = out[8] * camera.pivot[0] + out[9] * camera.pivot[1] + out[10] * camera.pivot[2] + out[11];
  out[11] += away * (zoom - 1);
  return out;
}

// The camera's intrinsics [fx, fy, cx, cy] for an image of another size: its own image fits inside, centred.
function lensFor(camera, width, height) {
  const scale = Math.min(width / camera.width, height / camera.height);
  const [fx, , cx, , fy, cy] = camera.K;
  return [
    fx * scale, fy * scale,
    width / 2 + (cx - camera.width / 2) * scale, height / 2 + (cy - camera.height / 2) * scale,
  ];
}

function eyeOf(view) {
  return [0, 1, 2].map((i) => -(view[i] * view[3] + view[4 + i] * view[7] + view[8 + i] * view[11]));
}
