"""Scripts that make the embedded model ``rheo-tiny`` from procedural video alone.

Order: :mod:`training.pool` (draws the clips), :mod:`training.train_autoencoder`, :mod:`training.train_dit`. Each is one
command with a fixed seed, resumes from its last checkpoint and writes its curves as CSV. No outside picture, video or
weight enters: see ``training/README.md``.
"""
