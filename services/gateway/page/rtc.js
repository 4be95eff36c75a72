// WebRTC by WHIP (what we send) and WHEP (what we see): offer, answer, trickled candidates, and coming back after a cut.

import { api, request } from "./api.js";

/** WebRTC is there at all. */
export const supported = typeof RTCPeerConnection === "function";

const SERVERS_MS = 5 * 60_000; // their credentials expire

let servers = { list: [], at: -Infinity };
let asking = null;

// A failure is not kept: what was told last may still do, and the next connection asks again.
async function iceServers() {
  if (Math.abs(Date.now() - servers.at) < SERVERS_MS) return servers.list;
  asking ??= api
    .iceServers()
    .then((told) => (servers = { list: told.iceServers, at: Date.now() }), () => {})
    .finally(() => (asking = null));
  await asking;
  return servers.list;
}

function fragment(pc, candidates) {
  const local = pc.localDescription.sdp;
  const line = (name) => new RegExp(`a=${name}:.*`).exec(local)?.[0] ?? "";
  const lines = [line("ice-ufrag"), line("ice-pwd")];
  const byMid = Map.groupBy ? Map.groupBy(candidates, (c) => c.sdpMid) : group(candidates);
  for (const [mid, some] of byMid) {
    const media = local.split("\r\nm=").find((part) => part.includes(`a=mid:${mid}\r\n`));
    lines.push(`m=${(media ?? "video 9 UDP/TLS/RTP/SAVPF 0").split("\r\n")[0]}`, `a=mid:${mid}`);
    for (const candidate of some) lines.push(`a=${candidate.candidate}`);
  }
  return `${lines.join("\r\n")}\r\n`;
}

function group(candidates) {
  const by = new Map();
  for (const candidate of candidates) by.set(candidate.sdpMid, [...(by.get(candidate.sdpMid) ?? []), candidate]);
  return by;
}

/** One negotiated connection. ``close`` tells the other side. */
class Session {
  constructor(pc, endpoint) {
    this.pc = pc;
    this.endpoint = endpoint;
    this.location = null;
    this.waiting = [];
    this.closed = false;
    pc.onicecandidate = ({ candidate }) => {
      if (!candidate?.candidate) return;
      this.waiting.push(candidate);
      this.trickle();
    };
  }

  async negotiate() {
    await this.pc.setLocalDescription(await this.pc.createOffer());
    const answer = await request(this.endpoint, {
      method: "POST",
      body: this.pc.localDescription.sdp,
      type: "application/sdp",
    });
    this.location = answer.headers.get("Location");
    this.etag = answer.headers.get("ETag") ?? "*";
    if (this.closed) return this.goodbye();
    await this.pc.setRemoteDescription({ type: "answer", sdp: await answer.text() });
    this.trickle();
  }

  // Candidates that come in one turn travel in one request; one that is lost costs a path, not the session.
  trickle() {
    if (!this.location || this.sending) return;
    this.sending = setTimeout(() => {
      this.sending = 0;
      const candidates = this.waiting.splice(0);
      if (!candidates.length || this.closed) return;
      const body = fragment(this.pc, candidates);
      const extra = { "If-Match": this.etag };
      request(this.location, { method: "PATCH", body, type: "application/trickle-ice-sdpfrag", extra }).catch(() => {});
    }, 30);
  }

  goodbye() {
    if (this.location) request(this.location, { method: "DELETE", keepalive: true }).catch(() => {});
  }

  close(tell = true) {
    if (this.closed) return;
    this.closed = true;
    clearTimeout(this.sending);
    this.pc.close();
    if (tell) this.goodbye();
  }
}

/** Keeps one connection up: ``open`` makes and negotiates it; after a cut it is made again, with back-off. */
class Kept {
  constructor(open, onState) {
    this.open = open;
    this.onState = onState;
    this.session = null;
    this.tries = 0;
    this.stopped = false;
    this.run();
  }

  async run() {
    this.onState("connecting");
    try {
      const session = await this.open();
      if (this.stopped) return session.close();
      this.session = session;
      session.pc.onconnectionstatechange = () => this.changed(session);
      await session.negotiate();
    } catch (error) {
      this.again(error);
    }
  }

  changed(session) {
    if (session !== this.session) return;
    const state = session.pc.connectionState;
    clearTimeout(this.grace);
    if (state === "connected") {
      this.tries = 0;
      this.onState("connected");
    } else if (state === "failed" || state === "closed") {
      this.again();
    } else if (state === "disconnected") {
      this.onState("cut"); // ICE may heal by itself within seconds
      this.grace = setTimeout(() => this.again(), 3000);
    }
  }

  again(error = null) {
    clearTimeout(this.grace);
    this.session?.close();
    this.session = null;
    if (this.stopped) return;
    this.onState("cut", error);
    if (error?.status >= 400 && error.status < 500 && error.status !== 429 && error.status !== 409) {
      this.onState("refused", error);
      return;
    }
    this.tries += 1;
    this.retry = setTimeout(() => this.run(), Math.min(8000, 400 * 2 ** this.tries));
  }

  /** Try at once, e.g. since the network is back. */
  hurry() {
    if (this.session || this.stopped) return;
    clearTimeout(this.retry);
    this.run();
  }

  /** End it. ``tell`` false: the stream is gone, and its sessions with it. */
  stop(tell = true) {
    this.stopped = true;
    clearTimeout(this.grace);
    clearTimeout(this.retry);
    this.session?.close(tell);
    this.session = null;
  }
}

/** Send a MediaStream to the stream ``id``. ``onState``: connecting, connected, cut, refused (with the error). */
export function publish(id, media, onState) {
  return new Kept(async () => {
    const pc = new RTCPeerConnection({ iceServers: await iceServers() });
    for (const track of media.getTracks()) {
      pc.addTransceiver(track, { direction: "sendonly", streams: [media] });
      if (track.kind === "video") track.contentHint = "motion";
    }
    // A cut may leave our own last session behind: this one takes its place.
    return new Session(pc, api.path(id, "/whip?takeover=true"));
  }, onState);
}

/** See the stream ``id`` in the <video> ``video``. ``onState`` as for publish. */
export function watch(id, video, onState) {
  return new Kept(async () => {
    const pc = new RTCPeerConnection({ iceServers: await iceServers() });
    pc.addTransceiver("video", { direction: "recvonly" });
    pc.addTransceiver("audio", { direction: "recvonly" });
    const media = new MediaStream();
    pc.ontrack = ({ track, receiver }) => {
      if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0; // egress paces already
      media.addTrack(track);
      if (video.srcObject !== media) video.srcObject = media;
      video.play().catch(() => {});
    };
    return new Session(pc, api.path(id, "/whep"));
  }, onState);
}
