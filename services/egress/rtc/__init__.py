"""WHEP: viewers by WebRTC. ``fanout.py`` hands every encoded packet to all of them, ``live_h264.py`` makes the packets once,
``viewers.py`` has the sessions, ``sending.py`` is the tap on the library's senders.

A client of both ways (``peer.py``) sends its own video, too: ``peer_input.py`` hands it to ingest. It may take VP8 alone
(``live_vp8.py``)."""
