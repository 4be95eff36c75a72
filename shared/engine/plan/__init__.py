"""The plan: what is computed, in which order, into which slot. Pure Python, no torch, no I/O."""
