"""A page that speaks Scope's API, in a real browser: one peer connection for both ways, VP8 as its front end asks for."""

from __future__ import annotations

import time

import httpx
import pytest

from tests.browser.conftest import Open

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

CLIENT = """async () => {
  const ask = async (method, path, body) => {
    const answer = await fetch(path, {method, headers: {'content-type': 'application/json'}, body: JSON.stringify(body)});
    if (!answer.ok) throw new Error(`${method} ${path}: ${answer.status} ${await answer.text()}`);
    return answer.status === 204 ? null : answer.json();
  };
  await ask('POST', '/api/v1/pipeline/load', {pipeline_ids: ['longlive'], load_params: {width: 160, height: 96}});
  const pc = new RTCPeerConnection(await ask('GET', '/api/v1/webrtc/ice-servers'));
  const channel = pc.createDataChannel('parameters', {ordered: true});
  const open = new Promise(done => { channel.onopen = done; });
  const camera = await navigator.mediaDevices.getUserMedia({video: {width: 640, height: 480, frameRate: 10}});
  const sender = pc.addTrack(camera.getVideoTracks()[0], camera);
  const vp8 = RTCRtpReceiver.getCapabilities('video').codecs.filter(codec => codec.mimeType === 'video/VP8');
  pc.getTransceivers().find(each => each.sender === sender).setCodecPreferences(vp8);
  pc.addTransceiver('audio', {direction: 'recvonly'});
  const video = document.createElement('video');
  video.muted = true;
  pc.ontrack = event => {
    if (event.track.kind === 'video') { video.srcObject = new MediaStream([event.track]); video.play(); }
  };
  let session = null;
  const found = [];
  const tell = candidate => ask('PATCH', `/api/v1/webrtc/offer/${session}`, {candidates: [candidate.toJSON()]});
  pc.onicecandidate = ({candidate}) => {
    if (candidate) { if (session) tell(candidate); else found.push(candidate); }
  };
  await pc.setLocalDescription(await pc.createOffer());
  const answer = await ask('POST', '/api/v1/webrtc/offer', {
    sdp: pc.localDescription.sdp, type: 'offer',
    initialParameters: {input_mode: 'video', prompts: [{text: 'a pencil drawing', weight: 100}],
      denoising_step_list: [700], noise_scale: 0.7, noise_controller: true, manage_cache: true},
  });
  session = answer.sessionId;
  await pc.setRemoteDescription(answer);
  for (const candidate of found) await tell(candidate);
  await open;
  channel.send(JSON.stringify({prompts: [{text: 'neon lights', weight: 100}]}));
  while (video.getVideoPlaybackQuality().totalVideoFrames < 20) await new Promise(done => setTimeout(done, 50));
  const canvas = new OffscreenCanvas(160, 96).getContext('2d');
  canvas.drawImage(video, 0, 0, 160, 96);
  const pixels = canvas.getImageData(0, 0, 160, 96).data;
  window.leave = () => { pc.close(); };
  const colours = pixels.filter((_, place) => place % 4 < 3);
  const range = Math.max(...colours) - Math.min(...colours);
  return {session, range, size: [video.videoWidth, video.videoHeight]};
}"""


def test_a_page_that_speaks_scopes_api_sees_itself_restyled(open_page: Open, system: str) -> None:
    page = open_page()
    seen = page.evaluate(CLIENT)
    assert seen["size"] == [160, 96]
    assert seen["range"] > 30, "the picture is one flat colour"
    stream = seen["session"].partition(".")[0]
    view = httpx.get(f"{system}/v1/streams/{stream}").json()
    assert (view["prompt"], view["state"] in ("live", "degraded")) == ("neon lights", True), view
    page.evaluate("() => window.leave()")
    until = time.monotonic() + 20
    while httpx.get(f"{system}/v1/streams/{stream}").json()["state"] != "stopped":
        assert time.monotonic() < until, "its stream goes on"
        time.sleep(0.2)
