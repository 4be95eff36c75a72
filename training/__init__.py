"""Scripts that make the embedded model ``rheo-tiny`` from procedural video alone.

Order: :mod:`training.pool` (draws the clips), :mod:`training.train_text`, :mod:`training.train_autoencoder`,
:mod:`training.train_dit`, :mod:`training.publish`; then :mod:`training.estimates` and the autoencoder's decoder again. The long
ones resume from their last checkpoint and write their curves as CSV. No outside picture, video or weight enters: see
``training/README.md``.
"""
