"use strict";
// A dialog over the page in which the user moves the points of the face, and paints what belongs to the person.

const BRUSH = [0.02, 0.05, 0.1];  // Radii of the brushes, as shares of the crop's side.

// Returns {points, mask}: the moved points, null if none was, and a PNG of the photograph's size, null if nothing was
// painted; or null if the dialog was closed.
async function correction(project) {
  const { points, crop: [left, top, side], size: [width, height] } = project.found;
  const [photo, cutout] = await Promise.all(["poster", "cutout"].map((key) => loaded(file(project, key))));
  const n = photo.naturalWidth;
  const mask = el("canvas", { width: n, height: n }), over = el("canvas", { width: n, height: n, className: "over" });
  mask.getContext("2d").drawImage(cutout, 0, 0, n, n);
  const places = Object.fromEntries(Object.entries(points).map(([name, [x, y]]) => [name, [(x - left) / side, (y - top) / side]]));
  let moved = false, painted = false, tool = "points", radius = BRUSH[1];

  const tint = () => {  // What is left out is shown darker.
    const context = over.getContext("2d"), image = mask.getContext("2d").getImageData(0, 0, n, n);
    for (let i = 0; i < image.data.length; i += 4) {
      image.data[i + 3] = 0.72 * (255 - image.data[i]);
      image.data[i] = image.data[i + 1] = image.data[i + 2] = 20;
    }
    context.putImageData(image, 0, 0);
  };
  tint();

  const handles = Object.keys(places).map((name) => {
    const handle = el("button", { type: "button", className: "handle", title: name, data: { "aria-label": `${name}: move with the arrow keys` } });
    const put = () => { handle.style.left = `${100 * places[name][0]}%`; handle.style.top = `${100 * places[name][1]}%`; };
    const to = (x, y) => { places[name] = [Math.min(1, Math.max(0, x)), Math.min(1, Math.max(0, y))]; moved = true; go.disabled = false; put(); };
    handle.onpointerdown = (event) => { handle.setPointerCapture(event.pointerId); event.preventDefault(); handle.focus(); };
    handle.onpointermove = (event) => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      const box = view.getBoundingClientRect();
      to((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    };
    handle.onkeydown = ({ key, shiftKey }) => {
      const step = (shiftKey ? 5 : 1) / n, by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[key];
      if (by) to(places[name][0] + by[0], places[name][1] + by[1]);
    };
    put();
    return handle;
  });

  const ring = el("div", { className: "ring", hidden: true });
  const view = el("div", { className: "view", data: { "data-tool": "points" } }, photo, over, ...handles, ring);
  let last = null;
  const stroke = (event) => {
    const box = view.getBoundingClientRect(), context = mask.getContext("2d");
    const at = [((event.clientX - box.left) / box.width) * n, ((event.clientY - box.top) / box.height) * n];
    Object.assign(context, { strokeStyle: tool === "add" ? "#fff" : "#000", lineWidth: 2 * radius * n, lineCap: "round" });
    context.beginPath();
    context.moveTo(...(last ?? at));
    context.lineTo(at[0] + 0.01, at[1]);
    context.stroke();
    [last, painted, go.disabled] = [at, true, false];
    tint();
  };
  view.onpointerdown = (event) => { if (tool !== "points") { view.setPointerCapture(event.pointerId); last = null; stroke(event); } };
  view.onpointermove = (event) => {
    const box = view.getBoundingClientRect();
    ring.hidden = tool === "points";
    Object.assign(ring.style, { left: `${event.clientX - box.left}px`, top: `${event.clientY - box.top}px`, width: `${2 * radius * box.width}px` });
    if (view.hasPointerCapture(event.pointerId)) stroke(event);
  };
  view.onpointerleave = () => { ring.hidden = true; };

  const tools = [["points", "Move points"], ["add", "Add to the person"], ["erase", "Leave out"]].map(([name, words]) => {
    const button = el("button", { type: "button", textContent: words, data: { "data-tool": name, "aria-pressed": String(name === tool) } });
    button.onclick = () => {
      view.dataset.tool = tool = name;
      tools.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
      sizes.hidden = tool === "points";
    };
    return button;
  });
  const sizes = el("input", { type: "range", min: 0, max: BRUSH.length - 1, value: 1, hidden: true, data: { "aria-label": "Size of the brush" } });
  sizes.oninput = () => { radius = BRUSH[sizes.value]; };
  const go = el("button", { type: "button", id: "again", className: "main", disabled: true, textContent: "Look again" });
  const cancel = el("button", { type: "button", textContent: "Cancel" });
  const dialog = el("dialog", { className: "correct", data: { "aria-label": "Correct what was found" } },
    el("div", { className: "bar" }, ...tools, sizes), view,
    el("p", { className: "help", textContent: "Put the points on brows, corners of the eyes, tip of the nose, corners of the mouth, lips and chin. Left and right are the person’s." }),
    el("div", { className: "bar" }, go, cancel));
  document.body.append(dialog);
  dialog.showModal();
  const said = await new Promise((done) => {
    dialog.onclose = () => done(false);
    cancel.onclick = () => dialog.close();
    go.onclick = () => done(true);
  });
  dialog.onclose = null;
  dialog.remove();
  if (!said) return null;
  const back = Object.fromEntries(Object.entries(places).map(([name, [x, y]]) => [name, [left + x * side, top + y * side]]));
  return { points: moved ? back : null, mask: painted ? await wholeMask(mask, left, top, side, width, height) : null };
}

function loaded(source) {
  return new Promise((done, fail) => {
    const image = el("img", { alt: "", draggable: false });
    image.onload = () => done(image);
    image.onerror = () => fail(new Error("The image could not be shown."));
    image.src = source;
  });
}

// The crop's mask in a picture of the photograph's size; what lies beside the crop is left out.
function wholeMask(mask, left, top, side, width, height) {
  const whole = el("canvas", { width, height }), context = whole.getContext("2d");
  context.fillRect(0, 0, width, height);
  context.drawImage(mask, left, top, side, side);
  return new Promise((done, fail) => whole.toBlob((blob) => (blob ? done(blob) : fail(new Error("The cut-out could not be sent."))), "image/png"));
}
