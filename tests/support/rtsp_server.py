"""``/usr/bin/python3 rtsp_server.py FILE PORT``: an RTSP server that plays an H.264 and AAC file at its pace, by GStreamer.

It runs under the system's Python, which has GStreamer's bindings; nothing of ours is imported.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def main(path: str, port: str) -> None:
    """Serve ``rtsp://127.0.0.1:PORT/x`` until ended."""
    gi: Any = importlib.import_module("gi")
    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    gst, rtsp, glib = (importlib.import_module(f"gi.repository.{name}") for name in ("Gst", "GstRtspServer", "GLib"))
    gst.init(None)
    server = rtsp.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    factory = rtsp.RTSPMediaFactory()
    factory.set_launch(
        f"( filesrc location={path} ! qtdemux name=d d.video_0 ! queue ! rtph264pay name=pay0 pt=96 config-interval=-1 "
        "d.audio_0 ! queue ! rtpmp4gpay name=pay1 pt=97 )"
    )
    server.get_mount_points().add_factory("/x", factory)
    server.attach(None)
    glib.MainLoop().run()


if __name__ == "__main__":
    main(*sys.argv[1:])
