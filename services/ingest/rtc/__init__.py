"""WHIP: a browser or encoder publishes by WebRTC. ``whip.py`` has the sessions; ``sources/whip.py`` decodes what comes."""
