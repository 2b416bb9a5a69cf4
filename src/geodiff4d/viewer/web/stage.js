// The head on its canvas: what it is asked to do, the pose of this moment, and drawing it when something has changed.

class Stage {
  constructor(canvas, scene, parts) {
    this.canvas = canvas;
    this.scene = scene;
    this.parts = parts;
    this.rig = new Rig(scene);
    this.renderer = new Renderer(canvas, scene, parts.shaders);
    this.sorter = new Sorter(parts.worker, scene);
    this.sorter.onorder = (order, number) => this.sorted(order, number);
    const { sequence, rest } = scene.arrays;
    this.rest = Float32Array.from(rest.values);
    this.fitted = new Performance(sequence.values, sequence.width, scene.fps);
    this.performance = this.fitted;
    this.look = { yaw: 0, pitch: 0, zoom: 1 };
    this.normals = false;
    this.background = [0, 0, 0, 0];
    this.quality = 1;
    this.times = { pose: 0, sort: 0, frame: 0 };
    this.waiting = [];
    this.reset();
    this.dirty = true;
    this.asked = 0;
    new ResizeObserver(() => this.change()).observe(canvas);
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => this.restored());
  }

  // The face at rest: nothing asked, nothing playing.
  reset() {
    this.weights = new Float32Array(this.rig.expressions);
    this.joints = { neck: [0, 0, 0], jaw: [0, 0, 0], body: [0, 0, 0] };
    this.playing = false;
    this.played = 0;
    this.motion = null;
    this.live = null;
    this.pointer = null;
    this.change();
  }

  change() {
    this.dirty = true;
    if (!this.asked) this.asked = requestAnimationFrame((now) => this.tick(now));
  }

  play(on) {
    this.playing = on;
    this.live = null;
    this.change();
  }

  perform(name) {
    this.motion = { at: MOTIONS[name].at, t: 0 };
    this.change();
  }

  // Frames of weights become a performance, which plays.
  load(frames, fps) {
    const width = this.fitted.width;
    const rows = new Float32Array(frames.length * width);
    frames.forEach(({ weights, neck }, i) => rows.set(withWeights(this.rest, weights, neck), i * width));
    this.performance = new Performance(rows, width, fps);
    this.played = 0;
    this.play(true);
  }

  tick(now) {
    this.asked = 0;
    if (this.fixed) return;
    const passed = this.last === undefined ? 0 : Math.min(0.1, (now - this.last) / 1000);
    this.last = now;
    if (this.playing) this.played += passed;
    if (this.motion) this.motion.t += passed;
    const moving = this.playing || this.motion !== null;
    if (moving || this.dirty) this.show(this.row());
    if (moving) {
      this.measure(passed);
      this.asked = requestAnimationFrame((next) => this.tick(next));
    } else this.last = undefined;
  }

  // The pose of this moment: rest, performance or live weights, then what is asked on top.
  row() {
    const base = this.live ?? (this.playing ? this.performance.at(this.played) : this.rest);
    const weights = this.weights.slice(), neck = this.joints.neck.slice();
    const extra = this.pointer ? [this.pointer] : [];
    if (this.motion) {
      const made = this.motion.at(this.motion.t);
      if (made) extra.push(made); else this.motion = null;
    }
    for (const { weights: named, neck: turn = [0, 0, 0] } of extra) {
      for (const [name, value] of Object.entries(named)) {
        const k = this.rig.names.indexOf(name);
        if (k >= 0) weights[k] = Math.min(1, weights[k] + value);
      }
      turn.forEach((angle, i) => { neck[i] += angle; });
    }
    return withWeights(base, weights, neck, this.joints.jaw, this.joints.body);
  }

  show(row) {
    this.dirty = false;
    const began = performance.now();
    this.renderer.pose(this.rig.pose(row));
    this.view = orbited(this.scene.camera, this.look);
    this.sorter.ask(this.rig.vertices, this.view);
    this.times.pose = performance.now() - began;
    this.draw();
  }

  sorted(order, number) {
    this.renderer.order(order);
    this.times.sort = this.sorter.ms;
    // A head that stands still is drawn once more, in its own order.
    if (number === this.sorter.number) {
      this.draw();
      this.waiting.splice(0).forEach((done) => done());
    }
  }

  size() {
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    return [this.canvas.clientWidth, this.canvas.clientHeight].map((side) => Math.max(1, Math.round(side * ratio)));
  }

  draw() {
    if (this.fixed || !this.view) return;
    const [width, height] = this.size();
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    this.drawAt(Math.max(1, Math.round(width * this.quality)), Math.max(1, Math.round(height * this.quality)), this.background,
      this.frame(width, height));
  }

  drawAt(width, height, background, frame) {
    const lens = lensFor(this.scene.camera, width, height);
    this.renderer.draw({ view: this.view, lens, width, height, normals: this.normals, background, frame });
  }

  // Where the fitted images' frame lies on the canvas: middle and half size [px], y up. It is as far as the head.
  frame(width, height) {
    const { camera } = this.scene;
    const scale = Math.min(width / camera.width, height / camera.height) / this.look.zoom;
    return [width / 2, height / 2, (scale * camera.width) / 2, (scale * camera.height) / 2];
  }

  // Where frames take long, as without a GPU, fewer pixels are drawn and scaled up.
  measure(seconds) {
    this.times.frame += 0.1 * (1000 * seconds - this.times.frame);
    this.slow = seconds > 0.045 ? (this.slow ?? 0) + 1 : Math.max(0, (this.slow ?? 0) - 2);
    if (this.slow > 8 && this.quality > 0.4) {
      this.quality *= 0.8;
      this.slow = 0;
    }
  }

  // One image of exactly this size and pose, in its own order, as a data URL (PNG).
  async shot({ width, height, row, look = this.look, normals = false, background = [0.5, 0.5, 0.5, 1] }) {
    const kept = { normals: this.normals, look: this.look };
    this.fixed = true;
    try {
      Object.assign(this, { normals, look });
      this.renderer.pose(this.rig.pose(row));
      this.view = orbited(this.scene.camera, look);
      const done = new Promise((resolve) => this.waiting.push(resolve));
      this.sorter.ask(this.rig.vertices, this.view);
      await done;
      Object.assign(this.canvas, { width, height });
      this.drawAt(width, height, background);
      return this.canvas.toDataURL("image/png");
    } finally {
      this.fixed = false;
      Object.assign(this, kept);
      this.change();
    }
  }

  restored() {
    this.renderer = new Renderer(this.canvas, this.scene, this.parts.shaders);
    this.change();
  }
}
