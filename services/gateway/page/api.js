// The gateway's API as the page uses it: one function per request, errors in words, the token in this tab only.

const TOKEN = "rheocast.token";

/** An answer that is no success. ``message`` is for people: the problem's detail, which says what would be accepted. */
export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title || `the server answered ${status}`);
    this.status = status;
    this.problem = problem;
    this.retryAfter = problem.retry_after_s ?? 0;
  }
}

/** The server did not answer at all. */
export class OfflineError extends Error {
  constructor() {
    super("Rheocast does not answer. Is it still running, and is the network up?");
  }
}

let askForToken = async () => null;

/** Register who asks for a token when the API wants one: an async function that gives it, or null. */
export function onTokenNeeded(ask) {
  askForToken = ask;
}

// A share link carries its token behind the #, which no server log sees; it is taken out of the address at once.
const behind = new URLSearchParams(location.hash.slice(1));
if (behind.has("token")) {
  sessionStorage.setItem(TOKEN, behind.get("token"));
  history.replaceState(null, "", location.pathname + location.search);
}

/** The stream that the address names, else null. */
export const watched = new URLSearchParams(location.search).get("stream");

/** This tab was opened by a share link: it sees one stream, and can change nothing. */
export const viewOnly = Boolean(watched) && (sessionStorage.getItem(TOKEN) ?? "").startsWith("share_");

function headers(extra) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { ...extra, Authorization: `Bearer ${token}` } : { ...extra };
}

let asking = null;

async function newToken() {
  asking ??= askForToken().finally(() => (asking = null));
  const token = await asking;
  if (token) sessionStorage.setItem(TOKEN, token);
  return Boolean(token);
}

/** fetch with the token; asks for one when the API wants it. Raises ApiError, OfflineError, or AbortError. */
export async function request(path, { method = "GET", body, type, signal, keepalive = false, extra = {} } = {}) {
  for (;;) {
    const sent = headers(type ? { ...extra, "Content-Type": type } : extra);
    let answer;
    try {
      answer = await fetch(path, { method, body, headers: sent, signal, keepalive, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new OfflineError();
    }
    if (answer.ok) return answer;
    if (answer.status === 401 && (await newToken())) continue;
    const problem = await answer.json().catch(() => ({ title: answer.statusText }));
    throw new ApiError(answer.status, problem);
  }
}

async function json(path, method = "GET", body = undefined, extra = {}) {
  const options = body === undefined ? { method, extra } : { method, body: JSON.stringify(body), type: "application/json", extra };
  const answer = await request(path, options);
  return answer.status === 204 ? null : answer.json();
}

const of = (id, part = "") => `/v1/streams/${encodeURIComponent(id)}${part}`;

export const api = {
  create: (spec) => json("/v1/streams", "POST", spec, { "Idempotency-Key": crypto.randomUUID?.() ?? `${Math.random()}` }),
  list: async () => (await json("/v1/streams")).streams,
  get: (id) => json(of(id)),
  patch: (id, changes) => json(of(id), "PATCH", changes),
  pause: (id) => json(of(id, "/pause"), "POST"),
  resume: (id) => json(of(id, "/resume"), "POST"),
  reset: (id) => json(of(id, "/reset"), "POST"),
  remove: (id, keepalive = false) => request(of(id), { method: "DELETE", keepalive }),
  prompt: (id, body) => json(of(id, "/prompt"), "POST", body),
  timeline: (id) => json(of(id, "/timeline")),
  putTimeline: (id, body) => json(of(id, "/timeline"), "PUT", body),
  playTimeline: (id, entry) => json(of(id, "/timeline/play"), "POST", { entry }),
  stopTimeline: (id) => json(of(id, "/timeline/stop"), "POST"),
  stats: (id) => json(of(id, "/stats")),
  trace: (id) => json(of(id, "/trace")),
  record: (id) => json(of(id, "/record"), "POST"),
  stopRecording: (id) => json(of(id, "/record"), "DELETE"),
  recording: (name) => api.blob(`/v1/recordings/${encodeURIComponent(name)}`),
  share: (id) => json(of(id, "/shares"), "POST", {}),
  receipt: (id, command) => json(of(id, `/receipts/${encodeURIComponent(command)}`)),
  capacity: (asked = {}) => json(`/v1/capacity?${new URLSearchParams(asked)}`),
  models: () => json("/v1/models"),
  styles: (model) => json(`/v1/models/${encodeURIComponent(model)}/styles`),
  iceServers: () => json("/v1/ice-servers"),
  snapshot: async (id, signal) => createImageBitmap(await (await request(of(id, "/snapshot.jpg"), { signal })).blob()),
  async blob(path) {
    return (await request(path)).blob();
  },
  path: of,
};

/** Upload a file; ``progress`` gets 0…1. XMLHttpRequest, since fetch tells no progress of what it sends. */
export function upload(file, progress) {
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open("POST", "/v1/uploads");
    const named = { "Content-Type": "application/octet-stream", "X-Upload-Name": encodeURIComponent(file.name).slice(-255) };
    for (const [name, value] of Object.entries(headers(named))) {
      sending.setRequestHeader(name, value);
    }
    sending.responseType = "json";
    sending.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    sending.onload = () =>
      sending.status < 300 ? resolve(sending.response) : reject(new ApiError(sending.status, sending.response ?? {}));
    sending.onerror = () => reject(new OfflineError());
    sending.send(file);
  });
}

/** Messages of a text/event-stream, one {event, data, id} after the other, until it ends or ``signal`` aborts. */
export async function* serverEvents(path, signal, lastId = "") {
  const answer = await request(path, { signal, extra: lastId ? { "Last-Event-ID": lastId } : {} });
  if (answer.status === 204) return; // everything was told
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r", "");
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const message = { event: "message", data: "", id: "" };
      for (const line of text.slice(0, end).split("\n")) {
        const colon = line.indexOf(":");
        const field = line.slice(0, colon);
        const said = line.slice(colon + 1).replace(/^ /, "");
        if (field === "data") message.data += (message.data ? "\n" : "") + said;
        else if (field === "event" || field === "id") message[field] = said;
      }
      text = text.slice(end + 2);
      if (message.data) yield message;
    }
  }
}

/** Pictures of a multipart/x-mixed-replace answer as ImageBitmaps, until it ends or ``signal`` aborts. */
export async function* pictures(path, signal) {
  const answer = await request(path, { signal });
  const reader = answer.body.getReader();
  let held = new Uint8Array(0);
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const joined = new Uint8Array(held.length + value.length);
    joined.set(held);
    joined.set(value, held.length);
    held = joined;
    let newest = null;
    for (;;) {
      const part = jpegIn(held);
      if (!part) break;
      newest = held.subarray(part.start, part.end);
      held = held.slice(part.end);
    }
    if (newest) yield createImageBitmap(new Blob([newest], { type: "image/jpeg" }));
  }
}

/** Where the first whole part's picture is, by its Content-Length. */
function jpegIn(bytes) {
  const head = new TextDecoder("latin1").decode(bytes.subarray(0, 1024));
  const blank = head.indexOf("\r\n\r\n");
  const length = /content-length:\s*(\d+)/i.exec(head);
  if (blank < 0 || !length || length.index > blank) return null;
  const start = blank + 4;
  const end = start + Number(length[1]);
  return end <= bytes.length ? { start, end } : null;
}
