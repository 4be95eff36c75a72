"""WebRTC for ingest (WHIP) and egress (WHEP, clients of both ways): SDP, one peer connection, what comes in by it, and the desk
that answers the gateway's requests.

``fragments.py`` is pure. Incoming media: ``receiving.py`` taps the library's receivers, ``jitter.py`` puts packets into frames,
``arrival.py`` tells when they were captured, ``inbox.py`` hands them to a thread, where ``decoding.py`` decodes them.
``scope_parameters.py`` reads what clients of Scope's protocol ask for. ``peer.py`` and ``receiving.py`` know the insides of the
WebRTC library, as does ``services/egress/rtc/sending.py``; they are imported with the first offer, so that a service without
the extra ``webrtc`` runs all the same.
"""
