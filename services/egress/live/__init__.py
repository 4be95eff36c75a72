"""Sinks that come and go while a stream runs: one H.264 encode and one JPEG encode for all of them."""
