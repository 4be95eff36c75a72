"""WebRTC for ingest (WHIP) and egress (WHEP): SDP, one peer connection, and the desk that answers the gateway's requests.

``fragments.py`` is pure. ``peer.py`` is the only file that knows the insides of the WebRTC library, with its two taps in
``services/ingest/rtc`` and ``services/egress/rtc``; it is imported with the first offer, so that a service without the extra
``webrtc`` runs all the same.
"""
