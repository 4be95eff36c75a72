"""motion: how much noise each chunk gets.

In: ``rheo.stream.<id>.latents`` (core), ``rheo.motion.assign`` (JetStream: take and leave a stream).
Out: ``rheo.stream.<id>.motion`` (core): the same chunk and latents, with motion, noise scale s and first timestep.

Owns a few floats per stream (the noise controller), mirrored in Redis after each chunk.

Failure policy: when it dies, the next life resumes each stream from its mirror on the stream's first chunk, without any
word from the scheduler; the chunk that was in its hands is lost. Without Redis it goes on and mirrors later. A chunk of
an older epoch, of a stream it does not know, or seen before is dropped and counted; one that was overtaken is passed on
with the noise of the newest, so that the scheduler decides. A message it cannot use never ends it.
"""
