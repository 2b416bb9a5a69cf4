// The controls: what the page shows of the stage, and what it asks of it.

const get = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

class Panel {
  // `tracker` has MediaPipe's files, or is null.
  constructor(stage, tracker) {
    this.stage = stage;
    this.webcam = new Webcam(stage, this, tracker);
    this.group = 0;
    this.sliders = [];
    this.buildMotions();
    this.build();
    this.listen();
    this.update();
  }

  buildMotions() {
    Object.entries(MOTIONS).forEach(([name, { label }], i) => {
      const key = String(i + 1);
      const button = element("button", { type: "button", title: `key ${key}`, onclick: () => this.stage.perform(name) }, label);
      button.setAttribute("aria-keyshortcuts", key);
      get("motions").append(button);
    });
  }

  // Tabs and sliders; again when the two sides come apart.
  build() {
    const groups = [...groupsFor(this.stage.rig.names, get("apart").checked), { label: "Head", items: HEAD }];
    this.sliders = [];
    get("tabs").replaceChildren();
    get("groups").replaceChildren();
    groups.forEach(({ label, items }, i) => {
      const name = label.toLowerCase();
      const tab = element("button", { type: "button", id: `tab-${name}`, role: "tab", onclick: () => this.select(i) }, label);
      tab.setAttribute("aria-controls", `group-${name}`);
      const body = element("div", { id: `group-${name}`, role: "tabpanel" });
      body.setAttribute("aria-labelledby", tab.id);
      items.forEach((item) => body.append(this.slider(item)));
      get("tabs").append(tab);
      get("groups").append(body);
    });
    this.select(Math.min(this.group, groups.length - 1));
    this.read();
  }

  select(index) {
    this.group = index;
    [...get("tabs").children].forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === index));
      tab.tabIndex = i === index ? 0 : -1;
      get("groups").children[i].hidden = i !== index;
    });
  }

  slider(item) {
    const limit = item.limit ?? 1;
    const low = item.low ?? (item.joint || item.minus.length ? -limit : 0);
    const input = element("input", { type: "range", min: low, max: limit, step: 0.01, value: 0 });
    const output = element("output");
    const entry = { item, input, output };
    input.oninput = () => { this.write(entry); this.stage.change(); };
    const row = element("label", { className: "slider", ondblclick: () => { input.value = 0; input.oninput(); } });
    row.append(element("span", {}, item.label), input, output);
    this.sliders.push(entry);
    return row;
  }

  // A slider's value to the stage.
  write({ item, input, output }) {
    const value = Number(input.value);
    if (item.joint) this.stage.joints[item.joint][item.axis] = value;
    else {
      for (const k of item.plus) this.stage.weights[k] = Math.max(0, value);
      for (const k of item.minus) this.stage.weights[k] = Math.max(0, -value);
    }
    output.value = this.shown(item, value);
  }

  shown(item, value) {
    return item.joint ? `${Math.round((value * 180) / Math.PI)}°` : String(Math.round(100 * value));
  }

  // The stage's values to all sliders.
  read() {
    const { weights, joints } = this.stage;
    for (const { item, input, output } of this.sliders) {
      const mean = (places) => places.reduce((sum, k) => sum + weights[k], 0) / Math.max(1, places.length);
      const value = item.joint ? joints[item.joint][item.axis] : mean(item.plus) - mean(item.minus);
      input.value = value;
      output.value = this.shown(item, value);
    }
  }

  update() {
    const { stage } = this;
    get("play").textContent = stage.playing ? "Pause" : "Play";
    get("play").setAttribute("aria-pressed", String(stage.playing));
    get("webcam").setAttribute("aria-pressed", String(this.webcam.on));
    get("normals").setAttribute("aria-pressed", String(stage.normals));
    get("follow").setAttribute("aria-pressed", String(this.following === true));
    this.read();
  }

  play(on = !this.stage.playing) {
    if (on && this.webcam.on) this.webcam.stop();
    this.stage.play(on);
    this.update();
  }

  reset() {
    this.following = false;
    this.stage.look = { yaw: 0, pitch: 0, zoom: 1 };
    this.stage.reset();
    this.update();
  }

  showNormals(on = !this.stage.normals) {
    this.stage.normals = on;
    this.stage.change();
    this.update();
  }

  follow(on = !this.following) {
    this.following = on;
    this.stage.pointer = null;
    this.stage.change();
    this.update();
  }

  // `value` is a CSS colour, `transparent`, or empty for the theme's own.
  setBackground(value) {
    const [r, g, b, a] = premultiplied(value);
    document.body.classList.toggle("see-through", value === "transparent");
    this.stage.background = [r, g, b, a];
    this.stage.change();
  }

  say(text, bad = false) {
    get("word").textContent = text;
    get("word").classList.toggle("bad", bad);
    clearTimeout(this.hush);
    if (text) this.hush = setTimeout(() => this.say(""), bad ? 9000 : 4000);
  }

  async open(file) {
    if (!file) return;
    try {
      if (file.size > 64e6) throw new Error("the file is larger than 64 MB");
      const text = await file.text(), { names } = this.stage.rig;
      const { frames, fps } = /\.csv$/i.test(file.name) ? readTable(text, names) : { frames: readLines(text, names) };
      this.stage.load(frames, Number(get("fps").value) || fps || this.stage.scene.fps);
      this.say(`${file.name}: ${frames.length} frames`);
    } catch (error) {
      this.say(`${file.name}: ${error.message}`, true);
    }
    this.update();
  }

  listen() {
    get("play").onclick = () => this.play();
    get("reset").onclick = () => this.reset();
    get("webcam").onclick = () => this.webcam.toggle();
    get("normals").onclick = () => this.showNormals();
    get("follow").onclick = () => this.follow();
    get("apart").onchange = () => this.build();
    get("file").onchange = ({ target }) => { this.open(target.files[0]); target.value = ""; };
    get("colour").oninput = ({ target }) => this.setBackground(target.value);
    get("see-through").onclick = () => this.setBackground("transparent");
    get("plain").onclick = () => this.setBackground("");
    get("theme").onclick = () => {
      const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
      document.documentElement.dataset.theme = dark ? "light" : "dark";
    };
    get("tabs").onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const count = get("tabs").children.length;
      this.select((this.group + step + count) % count);
      get("tabs").children[this.group].focus();
      event.preventDefault();
    };
    addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
    addEventListener("drop", (event) => {
      event.preventDefault();
      document.body.classList.remove("dropping");
      this.open(event.dataTransfer.files[0]);
    });
    addEventListener("keydown", (event) => this.key(event));
    this.listenToPointers();
  }

  key(event) {
    const { target, key } = event;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (target.matches?.("input, select, textarea") || (key === " " && target.matches?.("button, summary"))) return;
    const motion = Object.keys(MOTIONS)[Number(key) - 1];
    const turn = { ArrowLeft: [-5, 0], ArrowRight: [5, 0], ArrowUp: [0, 5], ArrowDown: [0, -5] }[key];
    const act = {
      " ": () => this.play(), r: () => this.reset(), n: () => this.showNormals(), f: () => this.follow(), w: () => this.webcam.toggle(),
      h: () => document.body.classList.toggle("alone"), "+": () => this.turn(0, 0, 0.9), "-": () => this.turn(0, 0, 1 / 0.9),
    }[key.toLowerCase()];
    if (motion) this.stage.perform(motion);
    else if (turn && target.role !== "tab") this.turn(turn[0], turn[1]);
    else if (act) act();
    else return;
    event.preventDefault();
  }

  turn(yaw, pitch, zoom = 1) {
    const { look } = this.stage;
    look.yaw += yaw;
    look.pitch = Math.min(MAX_PITCH_DEG, Math.max(-MAX_PITCH_DEG, look.pitch + pitch));
    look.zoom = Math.min(ZOOM[1], Math.max(ZOOM[0], look.zoom * zoom));
    this.stage.change();
  }

  // One finger or the mouse orbits, two fingers or the wheel come closer, a double click is the front again.
  listenToPointers() {
    const { canvas } = this.stage;
    const down = new Map();
    const gap = () => { const [a, b] = [...down.values()]; return Math.hypot(a[0] - b[0], a[1] - b[1]); };
    canvas.onpointerdown = (event) => {
      canvas.setPointerCapture(event.pointerId);
      down.set(event.pointerId, [event.clientX, event.clientY]);
    };
    canvas.onpointerup = canvas.onpointercancel = (event) => down.delete(event.pointerId);
    canvas.onpointermove = (event) => {
      const before = down.get(event.pointerId);
      if (!before) return;
      const apart = down.size === 2 ? gap() : 0;
      down.set(event.pointerId, [event.clientX, event.clientY]);
      if (down.size === 1) this.turn(-0.4 * (event.clientX - before[0]), 0.4 * (event.clientY - before[1]));
      else if (down.size === 2) this.turn(0, 0, apart / Math.max(1, gap()));
    };
    canvas.ondblclick = () => { Object.assign(this.stage.look, { yaw: 0, pitch: 0, zoom: 1 }); this.stage.change(); };
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.turn(0, 0, Math.exp(0.001 * event.deltaY));
    }, { passive: false });
    addEventListener("pointermove", (event) => {
      if (!this.following) return;
      const box = canvas.getBoundingClientRect();
      const across = clamped((2 * (event.clientX - box.left - box.width / 2)) / box.width);
      const up = clamped((-2 * (event.clientY - box.top - box.height / 2)) / box.height);
      this.stage.pointer = { weights: gaze(0.8 * across, 0.7 * up), neck: [-0.12 * up, 0.25 * across, 0] };
      this.stage.change();
    });
  }
}

const clamped = (x) => Math.min(1, Math.max(-1, x));

// A CSS colour as premultiplied RGBA from 0 to 1, which the browser itself reads; nothing where it is none.
function premultiplied(value) {
  const canvas = element("canvas", { width: 1, height: 1 });
  const context = canvas.getContext("2d");
  context.fillStyle = "rgba(0, 0, 0, 0)";
  context.fillStyle = value || "rgba(0, 0, 0, 0)";
  context.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
  return [r * a, g * a, b * a, 255 * a].map((x) => x / 65025);
}
