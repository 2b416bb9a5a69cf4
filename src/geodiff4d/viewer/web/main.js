// Starts the page: reads the avatar, makes the stage, its controls and its door to other pages.

const NO_WEBGL = "This page draws with WebGL2, which this browser lacks or has turned off. Please open it in a current Chrome, Edge, "
  + "Firefox or Safari, with hardware acceleration on.";

async function start() {
  const json = (id) => JSON.parse(get(id).textContent);
  if (!document.createElement("canvas").getContext("webgl2")) throw new Error(NO_WEBGL);
  if (!window.DecompressionStream) throw new Error("This page needs a browser of 2023 or later (DecompressionStream).");
  const scene = await readScene(get("avatar").textContent).catch((error) => {
    throw new Error(`The avatar in this file cannot be read (${error.message}): export or download it again.`);
  });
  const stage = new Stage(get("canvas"), scene, { shaders: json("shaders"), worker: json("worker") });
  const panel = new Panel(stage, json("tracker"));
  const settings = json("settings");
  const remote = new Remote(stage, panel, settings);
  if (settings.play && stage.fitted.frames > 1) panel.play(true);
  window.geodiff4d = { stage, panel, act: (asked) => remote.act(asked), names: scene.names };
  try { remote.address(location.search); } catch (error) { panel.say(`the page's address: ${error.message}`, true); }
  document.body.classList.add("ready");
}

start().catch((error) => {
  document.body.classList.add("failed");
  get("word").textContent = error.message;
  get("word").classList.add("bad");
});
