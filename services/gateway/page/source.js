// Where a new stream's picture comes from: the browser's camera or screen, an uploaded file, an address, or a sample.

import { upload } from "./api.js";
import { $, ask, choices } from "./dom.js";
import { supported } from "./rtc.js";

/** Why there is no picture, in words; ``others`` are the kinds to offer instead. */
export class SourceTrouble extends Error {
  constructor(title, text, others = ["sample", "file", "url"]) {
    super(text);
    this.title = title;
    this.others = others;
  }
}

/** What the user chose and then thought better of. */
export class Cancelled extends Error {}

function needWebrtc(what) {
  if (!supported) {
    throw new SourceTrouble("This browser has no WebRTC", `It cannot send a ${what}. A file, an address or the sample work all the same.`);
  }
  if (!navigator.mediaDevices) {
    throw new SourceTrouble(
      `The ${what} needs a safe address`,
      `Browsers give a ${what} only to pages over https or on localhost. Open Rheocast that way, or choose something else.`,
    );
  }
}

const REFUSALS = {
  NotAllowedError: [
    "The camera was refused",
    "Allow it at the left of the address bar and try again, or go on without it.",
  ],
  NotFoundError: ["No camera was found", "Plug one in and try again, or go on without it."],
  OverconstrainedError: ["That camera is gone", "Plug it in again, choose another one, or go on without it."],
  NotReadableError: ["The camera is in use", "Another program holds it. Close that and try again, or go on without it."],
};

function inWords(error, retry) {
  const [title, text] = REFUSALS[error.name] ?? ["The camera does not start", `${error.message}. Try again, or go on without it.`];
  return new SourceTrouble(title, text, [retry, "sample", "file", "url"]);
}

async function camera() {
  needWebrtc("camera");
  const device = choices.get("camera");
  const audio = choices.get("audio") === "1";
  const video = { width: { ideal: 640 }, height: { ideal: 480 }, frameRate: { ideal: 24, max: 30 } };
  const wanted = device ? { ...video, deviceId: { exact: device } } : { ...video, facingMode: "user" };
  let media;
  try {
    media = await navigator.mediaDevices.getUserMedia({ video: wanted, audio });
  } catch (error) {
    if (error.name === "OverconstrainedError" && device) {
      choices.set("camera", "");
      return camera();
    }
    throw inWords(error, "camera");
  }
  await listCameras(media);
  return { source: { kind: "whip" }, media, label: "camera" };
}

async function listCameras(media) {
  const devices = (await navigator.mediaDevices.enumerateDevices()).filter((device) => device.kind === "videoinput");
  const now = media.getVideoTracks()[0]?.getSettings().deviceId;
  $("cameras").replaceChildren(
    ...devices.map((device, index) => new Option(device.label || `camera ${index + 1}`, device.deviceId, false, device.deviceId === now)),
  );
  $("camera-pick").hidden = devices.length < 2;
}

async function screen() {
  needWebrtc("screen");
  if (!navigator.mediaDevices.getDisplayMedia) {
    throw new SourceTrouble("This browser shares no screen", "Phones cannot. The camera, a file or an address work.", ["camera", "sample", "file", "url"]);
  }
  try {
    const media = await navigator.mediaDevices.getDisplayMedia({ video: { frameRate: { ideal: 24, max: 30 } }, audio: false });
    return { source: { kind: "whip" }, media, label: "screen" };
  } catch (error) {
    if (error.name === "NotAllowedError") throw new Cancelled();
    throw new SourceTrouble("The screen is not shared", `${error.message}.`, ["screen", "camera", "sample"]);
  }
}

function pickFile() {
  const input = $("file");
  input.value = "";
  return new Promise((resolve, reject) => {
    input.onchange = () => (input.files[0] ? resolve(input.files[0]) : reject(new Cancelled()));
    input.oncancel = () => reject(new Cancelled());
    input.click();
  });
}

async function file(progress) {
  const chosen = await pickFile();
  const stored = await upload(chosen, (part) => progress(`Uploading ${chosen.name}: ${Math.round(100 * part)} %`));
  return { source: { kind: "file", path: stored.path, loop: true }, label: chosen.name };
}

async function url() {
  $("url").value = choices.get("url");
  const listening = new Promise((resolve) => {
    $("listen").onclick = () => {
      resolve({ source: { kind: "rtmp_listen" }, label: "RTMP push" });
      $("url-dialog").close("listen");
    };
  });
  const answered = ask("url-dialog").then((ok) => {
    if ($("url-dialog").returnValue === "listen") return listening;
    if (!ok) throw new Cancelled();
    const address = $("url").value.trim();
    choices.set("url", address);
    return { source: { kind: "url", url: address }, label: address.replace(/^\w+:\/\//, "").slice(0, 40) };
  });
  return answered;
}

async function sample() {
  return { source: { kind: "pattern", look: "scene" }, label: "sample" };
}

const KINDS = { camera, screen, file, url, sample };

/** {source, media?, label} of a new stream. Raises SourceTrouble, Cancelled, ApiError. ``progress`` gets lines to show. */
export function open(kind, progress) {
  return KINDS[kind](progress);
}
