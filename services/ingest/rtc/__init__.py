"""WHIP: a browser or encoder publishes by WebRTC. ``whip.py`` has the sessions, ``receiving.py`` taps the library's receivers,
``jitter.py`` puts packets into frames, ``inbox.py`` hands frames to the reader's thread (``sources/whip.py`` decodes them)."""
