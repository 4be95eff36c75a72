"""worker: one process per GPU (or CPU), hosting any of the roles text, encode, stage and decode.

In: ``rheo.stream.<id>.chunk`` (encode), ``rheo.pipeline.<p>.stage.<k>`` (stage), ``rheo.stream.<id>.denoised`` (decode),
``rheo.worker.assign``, ``rheo.text.encode``.
Out: ``rheo.stream.<id>.latents``, ``rheo.pipeline.<p>.stage.<k+1>``, ``rheo.pipeline.<p>.done``,
``rheo.stream.<id>.denoised``, ``rheo.stream.<id>.frames``, ``rheo.taken``.

Weights are shared; each stream owns its KV slots and autoencoder caches. One thread drives the device; the event loop
only moves messages. Failure policy: state is lost with the process. The scheduler sees the missed beats or the new
incarnation and fails or re-places the streams. A batch that raises is a pipeline fault, a chunk that raises is dropped:
neither ends the process.
"""
