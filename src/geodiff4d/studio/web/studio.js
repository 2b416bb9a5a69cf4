"use strict";
// The studio's page. Its state is the server's: this page asks for it every second and shows the chosen project.

const get = (id) => document.getElementById(id);
const SECOND = 1000;
const WORDS = {
  portrait: "waits for a portrait", look: "looking for the face", check: "waits for you", make: "in the making", done: "ready",
};
let state = { projects: [], limits: { portraits: 8, bytes: { portraits: 4e7, driver: 5e8 } } };
let chosen = location.hash.slice(1);
let shown = "";          // What the main part shows: rebuilt only when this changes, so that nothing typed is lost.
let refresh = () => {};  // Brings what is shown up to date.
let busy = "";           // What is being sent.
const previews = new Map();

history.replaceState(null, "", location.pathname + location.hash);  // The token is the cookie's now.

function el(tag, properties = {}, ...children) {
  const { data, ...rest } = properties;
  const node = Object.assign(document.createElement(tag), rest);
  for (const [key, value] of Object.entries(data ?? {})) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function drawing() {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 96 96");
  svg.setAttribute("aria-hidden", "true");
  for (const [d, width] of [
    ["M48 10c-17 0-27 12-27 28 0 20 12 36 27 36s27-16 27-36c0-16-10-28-27-28z", 3], ["M14 92c4-13 15-17 26-19M82 92c-4-13-15-17-26-19", 3],
    ["M48 10v64M21 40h54M27 22c12 7 30 7 42 0M28 58c12 6 28 6 40 0M34 14c-7 18-7 36 1 54M62 14c7 18 7 36-1 54", 1],
  ]) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    for (const [key, value] of Object.entries({ d, fill: "none", stroke: "currentColor", "stroke-width": width, "stroke-linecap": "round" })) {
      path.setAttribute(key, value);
    }
    svg.append(path);
  }
  return svg;
}

// ---- the server

async function ask(path, body) {
  const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body ?? {}) });
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error);
  return said;
}

function send(path, file, onShare) {
  return new Promise((done, fail) => {
    const request = new XMLHttpRequest();
    request.open("PUT", path);
    request.upload.onprogress = (event) => onShare(event.loaded / event.total);
    request.onload = () => {
      const said = JSON.parse(request.responseText || "{}");
      if (request.status === 200) done(said); else fail(new Error(said.error));
    };
    request.onerror = () => fail(new Error("the studio did not take the file"));
    request.send(file);
  });
}

const file = (project, key) => `/projects/${project.name}/files/${key}`;

async function act(what, body) {
  try {
    await ask(`/projects/${chosen}/${what}`, body);
  } catch (error) {
    say(error.message);
  }
  await look();
}

async function look() {
  try {
    const answer = await fetch("/state");
    if (!answer.ok) throw new Error(answer.status);
    state = await answer.json();
    get("lost").hidden = true;
  } catch {
    get("lost").hidden = false;
    return;
  }
  draw();
}

function theme() {
  return document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

// ---- uploads

function tooLarge(files, kind) {
  const limit = state.limits.bytes[kind];
  const large = files.find((one) => one.size > limit);
  return large ? `${large.name} has ${(large.size / 1e6).toFixed(0)} MB: at most ${limit / 1e6} MB are taken` : "";
}

async function portraits(files) {
  if (!files.length || busy) return;
  const problem = tooLarge(files, "portraits") || (files.length > state.limits.portraits ? `at most ${state.limits.portraits} portraits are taken` : "");
  if (problem) { say(problem); return; }
  busy = "Sending…";
  try {
    const waits = state.projects.find((p) => p.name === chosen && p.stage === "portrait");
    const name = waits ? chosen : (await ask("/projects")).name;
    if (files[0].type.startsWith("image/")) previews.set(name, URL.createObjectURL(files[0]));
    for (const one of files) await send(`/projects/${name}/portraits/${encodeURIComponent(one.name)}`, one, () => {});
    choose(name);
    await act("look");
  } catch (error) {
    say(error.message);
  } finally {
    busy = "";
  }
}

// ---- what is shown

function say(text, bad = true) {
  document.querySelector(".word.now")?.remove();
  const word = el("p", { className: `word now${bad ? " bad" : ""}`, textContent: text, data: { role: "alert" } });
  (get("main").querySelector(".sheet") ?? get("main")).prepend(word);
}

function choose(name) {
  chosen = name;
  history.replaceState(null, "", name ? `#${name}` : location.pathname);
  draw();
}

function word(project) {
  if (project.cancelled) return "cancelled";
  if (project.problem) return "something went wrong";
  if (project.progress && project.ahead) return `waits for ${project.ahead} other${project.ahead > 1 ? "s" : ""}`;
  if (project.progress && project.stage === "make") return `${Math.round(100 * project.progress.share)} %`;
  return WORDS[project.stage];
}

function draw() {
  const people = state.projects.map((project) => {
    const face = project.files.includes("poster") ? file(project, "poster") : previews.get(project.name) ?? "data:,";
    const button = el("button", { type: "button", onclick: () => choose(project.name), data: { "aria-current": project.name === chosen } },
      el("img", { className: "face", src: face, alt: "" }),
      el("span", { className: "name" }, el("strong", { textContent: project.title }),
        el("small", { textContent: word(project), className: project.problem && !project.cancelled ? "bad" : "" })));
    return el("li", {}, button);
  });
  const text = JSON.stringify(state.projects.map((p) => [p.name, p.title, word(p), p.files.includes("poster"), p.name === chosen]));
  if (get("people").dataset.shows !== text) {
    get("people").replaceChildren(...people);
    get("people").dataset.shows = text;
  }
  const project = state.projects.find((p) => p.name === chosen);
  const key = project ? [project.name, project.stage, project.problem].join("|") : "new";
  if (key !== shown) {
    shown = key;
    refresh = () => {};
    document.body.classList.toggle("fresh", !project);
    get("main").replaceChildren(!project ? newAvatar() : project.problem ? trouble(project) : VIEWS[project.stage](project));
  }
  if (project) refresh(project);
}

function newAvatar() {
  const input = el("input", { type: "file", multiple: true, accept: "image/*,video/*", id: "portraits" });
  input.onchange = () => portraits([...input.files]);
  const camera = el("input", { type: "file", accept: "image/*", data: { capture: "user" } });
  camera.onchange = () => portraits([...camera.files]);
  const touch = matchMedia("(pointer: coarse)").matches;
  const take = async () => { const photo = await fromWebcam(false); if (photo) portraits([photo]); };
  const photo = hasWebcam() ? el("button", { type: "button", id: "take", textContent: "Take a photo", onclick: take })
    : touch ? el("label", { className: "button" }, "Take a photo", camera) : null;
  const tip = (title, text) => el("li", { className: "help" }, el("strong", { textContent: title }), text);
  return el("div", { className: "sheet" },
    el("div", { className: "drop" }, drawing(),
      el("h2", { textContent: `${touch ? "Choose" : "Drop"} a portrait, get a head you can drive` }),
      el("div", { className: "bar" }, el("label", { className: "button main" }, "Choose a photo…", input), photo),
      el("p", { className: "help", textContent: `JPEG, PNG, WebP or a short video, up to ${state.limits.bytes.portraits / 1e6} MB. Several photos of the same person show more of them.` })),
    el("ul", { className: "tips" },
      tip("One face", "Looking at the camera or a little aside, with the whole head in the image."),
      tip("Even light", "What the portrait shows stays sharp; what it hides is a guess."),
      tip("A calm face", "Lips closed, eyes open, no hands in front.")));
}

function picture(project, key, className, alt) {
  const source = project.files.includes(key) ? file(project, key) : previews.get(project.name);
  return el("figure", { className: `stage ${className}` }, source ? el("img", { src: source, alt }) : el("div", { className: "none" }, drawing()));
}

// The tracker's strip has four panels a portrait: landmarks, the head, the cut-out, the surface.
function panels(project) {
  const names = ["Points on the face", "The head behind it", "Cut out", "Its surface"];
  const boxes = names.map((name, k) => {
    const image = el("img", { src: file(project, "overlay"), alt: `${name}, over the portrait`, className: `panel${k}` });
    const box = el("div", {}, image);
    image.onload = () => { box.style.aspectRatio = `${image.naturalWidth} / ${4 * image.naturalHeight}`; };
    const larger = el("button", { type: "button", className: "look", title: "Larger or smaller", data: { "aria-pressed": "false" } },
      box, el("span", { className: "caption", textContent: name }));
    larger.onclick = () => larger.setAttribute("aria-pressed", String(larger.classList.toggle("large")));
    return larger;
  });
  return el("div", { className: "panels" }, ...boxes);
}

function looking(project) {
  const ahead = el("p", { className: "help", data: { role: "status" } });
  refresh = (now) => { ahead.textContent = now.progress?.steps[0].detail || "This takes some seconds."; };
  return el("div", { className: "sheet centre" }, picture(project, "poster", "round", "The portrait"),
    el("h2", { textContent: "Looking for the face…" }),
    ahead, el("div", { className: "bar" }, el("button", { type: "button", textContent: "Cancel", onclick: () => act("cancel") })));
}

function checking(project) {
  const source = el("input", { type: "file", accept: "video/*", id: "driver" });
  const sent = el("span", { className: "help", textContent: "Expressions, timing and head turns of whoever is in it. The first ten seconds are watched." });
  const choice = (name, value, title, help, extra) => {
    const input = el("input", { type: "radio", name, value });
    const under = help instanceof Node ? help : el("span", { className: "help", textContent: help });
    return [input, el("label", { className: "choice" }, input, el("span", { textContent: title }), under, extra)];
  };
  const [range, rangeLabel] = choice("driver", "range", "Everything a face does", "A range of motion that ships with geodiff4d.");
  const record = hasWebcam() ? el("button", { type: "button", id: "record", textContent: "Record yourself…" }) : null;
  const videoButton = el("div", { className: "bar inner" }, el("label", { className: "button" }, "Choose a video…", source), record);
  const [video, videoLabel] = choice("driver", "video", "A video of somebody", sent, videoButton);
  const [me, meLabel] = choice("consent", "self", "This is me", "");
  const [may, mayLabel] = choice("consent", "permitted", "I may use this person’s portrait", "");
  range.checked = true;
  const go = el("button", { type: "submit", className: "main", textContent: "Make the avatar" });
  let taken = Boolean(project.driver), sending = false;
  const check = () => { go.disabled = sending || !(me.checked || may.checked) || (video.checked && !taken); };
  source.onchange = () => drive(source.files[0]);
  if (record) record.onclick = async () => drive(await fromWebcam(true));
  const drive = async (one) => {
    if (!one) return;
    video.checked = true;
    const problem = tooLarge([one], "driver");
    if (problem) { say(problem); return; }
    sending = true; taken = false; check();
    try {
      await send(`/projects/${project.name}/driver/${encodeURIComponent(one.name)}`, one, (share) => {
        sent.textContent = `Sending ${one.name}: ${Math.round(100 * share)} %`;
      });
      sent.textContent = `${one.name} will drive.`;
      taken = true;
    } catch (error) { say(error.message); }
    sending = false; check();
  };
  if (project.driver) sent.textContent = `${project.driver} will drive.`;
  const form = el("form", { onchange: check },
    el("fieldset", {}, el("legend", { textContent: "What should it learn to do?" }), rangeLabel, videoLabel),
    el("fieldset", {}, el("legend", { textContent: "Whose face is it?" }), meLabel, mayLabel,
      el("p", { className: "help", textContent: "Your word is stored with the avatar, and signed into its files where the extra “provenance” is installed." })),
    el("div", { className: "bar" }, go, el("button", { type: "button", className: "plain", textContent: "No, another portrait", onclick: () => act("back") })));
  form.onsubmit = (event) => {
    event.preventDefault();
    act("make", { consent: me.checked ? "self" : "permitted", driver: video.checked });
  };
  check();
  const mend = project.found ? el("button", { type: "button", id: "correct", textContent: "Correct it…", onclick: async () => {
    const told = await correction(project);
    if (!told) return;
    try {
      if (told.mask) await send(`/projects/${project.name}/mask/mask.png`, told.mask, () => {});
      await act("correct", { points: told.points });
    } catch (error) { say(error.message); }
  } }) : null;
  const notes = (project.notes ?? []).map((note) => el("p", { className: "word", textContent: note }));
  return el("div", { className: "sheet" }, el("h2", { textContent: "Was the face found?" }),
    el("div", { className: "two" },
      el("div", { className: "stack" }, panels(project), ...notes,
        el("p", { className: "help", textContent: "Eyes, mouth and chin should lie where the portrait has them, and the cut-out should show this person and nothing else. Click an image to see it larger. If something is wrong, correct it, or take another portrait." }),
        mend ? el("div", { className: "bar" }, mend) : null),
      form));
}

function making(project) {
  const bar = el("progress", { max: 1, value: 0, data: { "aria-label": "Progress" } });
  const steps = el("ol", { className: "steps" });
  const time = el("p", { className: "help", data: { role: "status" } });
  let best = 0, began = Date.now(), from = null;
  refresh = (now) => {
    if (!now.progress) return;
    from ??= now.progress.share;
    best = Math.max(best, now.progress.share);
    bar.value = best;
    steps.replaceChildren(...now.progress.steps.map((step) => el("li", { className: step.state },
      el("span", { textContent: step.says }), el("small", { textContent: step.state === "running" && !now.ahead ? step.detail : "" }))));
    const spent = (Date.now() - began) / SECOND, left = best - from > 0.02 ? (spent * (1 - best)) / (best - from) : null;
    const about = left === null ? "A few minutes on two cores." : `About ${spoken(left)} left.`;
    time.textContent = now.ahead ? `Waits for ${now.ahead} other${now.ahead > 1 ? "s" : ""}.` : `${about} You may close this page.`;
  };
  return el("div", { className: "sheet" }, el("div", { className: "two" }, picture(project, "poster", "", "The portrait"),
    el("div", { className: "stack" }, el("h2", { textContent: "Making the avatar" }), bar, steps, time,
      el("div", { className: "bar" }, el("button", { type: "button", textContent: "Cancel", onclick: () => act("cancel") })))));
}

function spoken(seconds) {
  return seconds > 90 ? `${Math.ceil(seconds / 60)} minutes` : `${Math.max(5, Math.ceil(seconds / 5) * 5)} seconds`;
}

function trouble(project) {
  const again = el("button", { type: "button", className: "main", textContent: project.cancelled ? "Go on" : "Try again", onclick: () => act("again") });
  const back = el("button", { type: "button", textContent: project.stage === "make" ? "Another driver" : "Another portrait", onclick: () => act("back") });
  const text = project.cancelled ? "What was finished is kept." : project.problem[0].toUpperCase() + project.problem.slice(1);
  return el("div", { className: "sheet centre" }, picture(project, "poster", "round", "The portrait"),
    el("h2", { textContent: project.cancelled ? "Cancelled" : project.stage === "look" ? "No face that could be followed" : "That did not work" }),
    el("p", { className: `word${project.cancelled ? "" : " bad"}`, textContent: text }),
    el("div", { className: "bar" }, project.cancelled || project.stage === "make" ? again : null, back,
      el("a", { className: "button", href: `/projects/${project.name}/log`, target: "_blank", textContent: "Log" }), remove(project)));
}

function remove(project) {
  const button = el("button", { type: "button", className: "plain", textContent: "Delete" });
  button.onclick = async () => {
    if (!confirm(`Delete ${project.title} with all of its files?`)) return;
    await act("delete");
    choose("");
  };
  return button;
}

function ready(project) {
  const offers = [["page", "Page", ".html"], ["glb", "glTF", ".glb"], ["ply", "Splats", ".ply"], ["video", "Video", ".mp4"]]
    .filter(([key]) => project.files.includes(key))
    .map(([key, name, ending]) => el("a", {
      className: "button", href: `${file(project, key)}?download`, download: "", title: `Download ${ending}`,
    }, name, el("small", { textContent: ending })));
  // The avatar's page has no need of this one: without an origin it can reach nothing of the studio.
  const frame = el("iframe", { src: `${file(project, "page")}?theme=${theme()}`, title: `${project.title}, to drive`, data: { sandbox: "allow-scripts", allow: "fullscreen" } });
  return el("section", { className: "avatar" }, el("header", {}, el("h2", { textContent: project.title }), ...offers, remove(project)), frame);
}

const VIEWS = { portrait: newAvatar, look: looking, check: checking, make: making, done: ready };

// ---- the page

get("new").onclick = () => choose("");
get("theme").onclick = () => {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  document.querySelector("iframe")?.contentWindow.postMessage({ geodiff4d: { theme: theme() } }, "*");
};
window.onhashchange = () => choose(location.hash.slice(1));
for (const kind of ["dragenter", "dragover"]) {
  window.addEventListener(kind, (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
}
for (const kind of ["dragleave", "drop"]) {
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    if (kind === "drop" || !event.relatedTarget) document.body.classList.remove("dropping");
  });
}
window.addEventListener("drop", (event) => {
  const project = state.projects.find((p) => p.name === chosen);
  if (project && project.stage !== "portrait") choose("");
  portraits([...event.dataTransfer.files]);
});

draw();
look();
setInterval(look, SECOND);
