"use strict";
// The webcam in a dialog over the page: a photograph, or some seconds of video of whoever drives.

const VIDEO_SECONDS = 10;
const WEBCAM_WORDS = {
  NotAllowedError: "The browser did not allow the webcam. Allow it beside the page’s address, then try again.",
  NotFoundError: "No webcam was found.",
  NotReadableError: "The webcam is used by another program.",
};

// Browsers give a webcam to pages of this machine and of https alone.
const hasWebcam = () => Boolean(navigator.mediaDevices?.getUserMedia);

// Returns a File, or null if the dialog was closed; `moving` is whether it is a video.
async function fromWebcam(moving) {
  const video = el("video", { muted: true, autoplay: true, playsInline: true });
  const status = el("p", { className: "help", textContent: "Starting the webcam…", data: { role: "status" } });
  const go = el("button", { type: "button", className: "main", disabled: true, textContent: moving ? `Record ${VIDEO_SECONDS} seconds` : "Take the photo" });
  const cancel = el("button", { type: "button", textContent: "Cancel" });
  const dialog = el("dialog", { className: "webcam", data: { "aria-label": moving ? "Record a video" : "Take a photo" } },
    el("div", { className: "view" }, video), status, el("div", { className: "bar" }, go, cancel));
  document.body.append(dialog);
  dialog.showModal();
  let stream = null, recorder = null;
  const taken = new Promise((done) => {
    dialog.onclose = () => done(null);
    cancel.onclick = () => dialog.close();
    go.onclick = async () => {
      go.disabled = true;
      try {
        if (moving) {
          recorder = new MediaRecorder(stream);
          done(await recorded(recorder, status));
        } else done(await photograph(video));
      } catch (error) { status.textContent = error.message; }
    };
  });
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 }, height: { ideal: 960 }, facingMode: "user" }, audio: false });
    stream.getVideoTracks()[0].onended = () => { go.disabled = true; status.textContent = "The webcam was lost."; };
    video.srcObject = stream;
    await video.play();
    status.textContent = moving ? "Talk, smile, look around: what you do, the avatar will." : "Face the camera, with a calm face in even light.";
    go.disabled = !dialog.open;
  } catch (error) {
    status.textContent = WEBCAM_WORDS[error.name] ?? `The webcam did not start (${error.message}).`;
  }
  const file = await taken;
  dialog.onclose = null;
  if (recorder?.state === "recording") recorder.stop();
  stream?.getTracks().forEach((track) => track.stop());
  dialog.remove();
  return file;
}

function photograph(video) {
  const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((done, fail) => canvas.toBlob(
    (blob) => (blob ? done(new File([blob], "webcam.jpg", { type: blob.type })) : fail(new Error("The photo could not be taken."))), "image/jpeg", 0.95));
}

function recorded(recorder, status) {
  const parts = [];
  recorder.ondataavailable = ({ data }) => parts.push(data);
  recorder.start();
  let left = VIDEO_SECONDS;
  const tick = () => {
    if (recorder.state !== "recording") return;
    status.textContent = `Recording: ${left} s left`;
    if (left-- > 0) setTimeout(tick, 1000); else recorder.stop();
  };
  tick();
  return new Promise((done, fail) => {
    recorder.onerror = () => fail(new Error("The recording failed."));
    recorder.onstop = () => {
      const type = recorder.mimeType.split(";")[0];
      done(new File(parts, `webcam.${type.split("/")[1] ?? "webm"}`, { type }));
    };
  });
}
