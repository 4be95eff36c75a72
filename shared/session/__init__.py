"""Session state: one hash per stream, each field with one owner, behind a port with Redis and memory adapters."""
