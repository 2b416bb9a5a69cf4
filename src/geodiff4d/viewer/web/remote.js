// Driving the page from outside: parameters of its address, messages of other pages, and live weights of its server.

class Remote {
  constructor(stage, panel, { origins, live }) {
    Object.assign(this, { stage, panel, origins });
    this.reader = new LineReader(stage.rig.names);
    addEventListener("message", (event) => this.message(event));
    if (live) this.follow();
  }

  // ?set=jawOpen:0.4,mouthSmileLeft:1&yaw=20&pitch=0&zoom=1&play=1&motion=smile&normals=1&background=…&theme=dark&ui=0
  address(search) {
    const given = new URLSearchParams(search);
    const asked = {};
    for (const name of ["yaw", "pitch", "zoom"]) if (given.has(name)) asked[name] = Number(given.get(name));
    for (const name of ["play", "normals"]) if (given.has(name)) asked[name] = given.get(name) === "1";
    for (const name of ["motion", "background", "theme"]) if (given.has(name)) asked[name] = given.get(name);
    if (given.has("ui")) asked.ui = given.get("ui") !== "0";
    if (given.has("set"))
      asked.set = Object.fromEntries(given.get("set").split(",").filter(Boolean).map((word) => {
        const [name, weight] = word.split(":");
        return [name, Number(weight)];
      }));
    this.act(asked);
  }

  welcome(origin) {
    if (this.origins.includes("*") || this.origins.includes(origin)) return true;
    // Files have no origin to name: a file may drive a file.
    return location.protocol === "file:" ? origin === "null" || origin === "file://" : origin === location.origin;
  }

  // Messages are {geodiff4d: {…}}; the sender is answered with {geodiff4d: {done: true}} or {geodiff4d: {error}}.
  message(event) {
    const asked = event.data?.geodiff4d;
    if (typeof asked !== "object" || asked === null) return;
    if (!this.welcome(event.origin)) {
      console.warn(`geodiff4d: a message from ${event.origin} was refused; export the page with --origin to allow it`);
      return;
    }
    let answer = { done: true };
    try {
      this.act(asked);
      if (asked.names) answer = { names: this.stage.rig.names };
    } catch (error) { answer = { error: error.message }; }
    event.source?.postMessage({ geodiff4d: answer }, { targetOrigin: event.origin === "null" ? "*" : event.origin });
  }

  // Does what an address, a message or a script asks; throws an Error, before anything has changed, if it is wrong.
  act(asked) {
    const { stage, panel } = this;
    const look = asked.reset ? { yaw: 0, pitch: 0, zoom: 1 } : { ...stage.look };
    for (const [name, [low, high]] of Object.entries({ yaw: [-1e6, 1e6], pitch: [-MAX_PITCH_DEG, MAX_PITCH_DEG], zoom: ZOOM }))
      if (asked[name] !== undefined) look[name] = Math.min(high, Math.max(low, finite(asked[name], name)));
    if (asked.motion !== undefined && !Object.hasOwn(MOTIONS, asked.motion))
      throw new Error(`motion ${asked.motion}: expected ${Object.keys(MOTIONS).join(", ")}`);
    const line = this.line(asked);
    if (asked.reset) panel.reset();
    stage.look = look;
    if (line) this.apply(line, asked);
    if (asked.frames) stage.load(asked.frames.map((frame, i) => this.reader.record(frame, `frame ${i + 1}`)), asked.fps || stage.scene.fps);
    if (asked.play !== undefined) stage.play(Boolean(asked.play));
    if (asked.motion !== undefined) stage.perform(asked.motion);
    if (asked.normals !== undefined) stage.normals = Boolean(asked.normals);
    if (asked.background !== undefined) panel.setBackground(String(asked.background));
    if (asked.theme !== undefined) document.documentElement.dataset.theme = asked.theme === "dark" ? "dark" : "light";
    if (asked.ui !== undefined) document.body.classList.toggle("alone", !asked.ui);
    stage.change();
    panel.update();
  }

  line({ set, weights, names, neck }) {
    if (set === undefined && weights === undefined && neck === undefined) return null;
    return this.reader.record({ ...set, ...(weights && { weights }), ...(names && Array.isArray(names) && { names }), ...(neck && { neck }) }, "the message");
  }

  // `set` changes the expressions that it names; `weights` are all of them.
  apply(line, { set, weights, neck }) {
    const { stage } = this;
    if (weights !== undefined) stage.weights = line.weights;
    for (const name of Object.keys(set ?? {})) {
      const k = this.reader.place(name, "the message");
      stage.weights[k] = line.weights[k];
    }
    if (neck !== undefined) stage.joints.neck = [...line.neck];
  }

  // A server that tracks somebody sends poses as they come; the browser connects again by itself.
  follow() {
    const events = new EventSource("live");
    events.onmessage = ({ data }) => {
      this.stage.live = Float32Array.from(JSON.parse(data));
      this.stage.change();
    };
    events.onerror = () => this.panel.say("The program does not answer; asking again.", true);
    events.onopen = () => this.panel.say("");
  }
}

function finite(value, name) {
  if (typeof value !== "number" || !Number.isFinite(value)) throw new Error(`${name} is no number`);
  return value;
}
