// A webcam that drives the head, by MediaPipe's face landmarker. Its files are in the page if whoever made the page had
// them (viewer/face_tracker.py); images stay in the page.

const WITHOUT_TRACKER = "This page was made without MediaPipe’s files, which follow a face. Export it again with --face-landmarker.";
const NOT_ALLOWED = {
  NotAllowedError: "The browser did not allow the webcam.",
  NotFoundError: "No webcam was found.",
  NotReadableError: "The webcam is used by another program.",
};
const MOST_NECK = 0.8;
const LOST_SECONDS = 2;

class Webcam {
  constructor(stage, panel, packed) {
    Object.assign(this, { stage, panel, packed, on: false });
    this.video = get("self-view");
  }

  toggle() {
    return this.on ? this.stop() : this.start();
  }

  async start() {
    if (!this.packed) { this.panel.say(WITHOUT_TRACKER, true); return; }
    this.on = true;
    this.panel.update();
    try {
      if (!navigator.mediaDevices) throw new Error("Browsers give a webcam to pages from https, from this machine or from a file alone.");
      this.panel.say("Starting the webcam…");
      const video = { width: { ideal: 640 }, height: { ideal: 480 }, facingMode: "user" };
      const stream = await navigator.mediaDevices.getUserMedia({ video, audio: false });
      this.stream = stream;
      this.tracker ??= await faceTracker(this.packed);
      if (!this.on) { this.stop(); return; }
      const [track] = stream.getVideoTracks();
      if (track.readyState === "ended") throw new Error("The webcam was lost.");
      track.onended = () => this.stop("The webcam was lost.");
      this.video.srcObject = stream;
      await this.video.play();
    } catch (error) {
      this.stop(NOT_ALLOWED[error.name] ?? error.message ?? String(error));
      return;
    }
    this.rest = new RestingFace(this.stage.rig.expressions);
    this.smooth = null;
    this.seen = performance.now();
    document.body.classList.add("filming");
    this.panel.say("Look at the camera with a calm face for a second.");
    this.panel.update();
    this.step();
  }

  stop(problem = "") {
    this.on = false;
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = this.video.srcObject = null;
    document.body.classList.remove("filming");
    this.stage.live = null;
    this.stage.change();
    this.panel.say(problem, Boolean(problem));
    this.panel.update();
  }

  step() {
    if (!this.on) return;
    const { video } = this;
    if (video.readyState >= 2 && video.currentTime !== this.shown) {
      this.shown = video.currentTime;
      try { this.follow(this.tracker.detectForVideo(video, performance.now())); } catch (error) {
        this.stop(`The face tracker failed: ${error.message}`);
        return;
      }
    }
    requestAnimationFrame(() => this.step());
  }

  follow({ faceBlendshapes: [face], facialTransformationMatrixes: [matrix] }) {
    const now = performance.now();
    if (!face || !matrix) {
      if (now - this.seen > 1000 * LOST_SECONDS) { this.panel.say("No face is seen."); this.seen = now; }
      return;
    }
    this.seen = now;
    const { names } = this.stage.rig;
    const asked = new Map(face.categories.map(({ categoryName, score }) => [categoryName, score]));
    const row = [...names.map((name) => asked.get(name) ?? 0), ...turnOf(matrix.data)];
    this.smooth = this.smooth ? this.smooth.map((x, i) => x + 0.6 * (row[i] - x)) : row;
    this.drive(this.rest.moved(this.smooth));
  }

  drive(row) {
    const E = this.stage.rig.expressions;
    const weights = Float32Array.from(row.slice(0, E)), neck = row.slice(E);
    if (get("mirror").checked) {
      const { names } = this.stage.rig, sides = { Left: "Right", Right: "Left" };
      names.forEach((name, k) => {
        const other = names.indexOf(name.replace(/Left|Right/, (side) => sides[side]));
        if (other >= 0) weights[k] = row[other];
      });
      neck[1] *= -1; neck[2] *= -1;
    }
    this.stage.live = withWeights(this.stage.rest, weights, neck);
    this.stage.change();
  }
}

// Whoever drives is not neutral at rest: what is copied is how far they are from it (avatar/relative.py). Rest is the
// tenth percentile of each weight, and the median of each angle, over the frames so far.
class RestingFace {
  constructor(expressions) {
    this.expressions = expressions;
    this.rows = [];
    this.count = 0;
    this.rest = new Array(expressions + 3).fill(0);
  }

  moved(row) {
    this.rows.push(row);
    if (this.rows.length > 512) this.rows = this.rows.filter((_, i) => i % 2 === 0);
    if (++this.count === 8 || this.count % 24 === 0) this.estimate();
    return row.map((x, k) => {
      const rest = this.rest[k];
      if (k >= this.expressions) return Math.min(MOST_NECK, Math.max(-MOST_NECK, x - rest));
      return Math.max(0, (x - rest) / Math.max(1e-3, 1 - rest));
    });
  }

  estimate() {
    this.rest = this.rest.map((_, k) => {
      const sorted = this.rows.map((row) => row[k]).sort((a, b) => a - b);
      return sorted[Math.floor((k < this.expressions ? 0.1 : 0.5) * (sorted.length - 1))];
    });
  }
}

// The rotation of a rigid 4×4 matrix, column by column, as axis-angle. Its axes are the head's: x to the head's left in
// an image that is not mirrored, y up, z to the camera.
function turnOf(m) {
  const axis = [m[6] - m[9], m[8] - m[2], m[1] - m[4]];
  const sine = Math.hypot(...axis) / 2, cosine = (m[0] + m[5] + m[10] - 1) / 2;
  const share = sine > 1e-6 ? Math.atan2(sine, cosine) / (2 * sine) : 0.5;
  return axis.map((x) => x * share);
}

async function faceTracker(packed) {
  const parts = {};
  for (const [name, text] of Object.entries(packed)) parts[name] = await inflated(text);
  const address = (bytes, type) => URL.createObjectURL(new Blob([bytes], { type }));
  const { FaceLandmarker } = await import(address(parts.module, "text/javascript"));
  return FaceLandmarker.createFromOptions(
    { wasmLoaderPath: address(parts.loader, "text/javascript"), wasmBinaryPath: address(parts.binary, "application/wasm") },
    {
      baseOptions: { modelAssetBuffer: parts.task }, runningMode: "VIDEO", numFaces: 1,
      outputFaceBlendshapes: true, outputFacialTransformationMatrixes: true,
    });
}
