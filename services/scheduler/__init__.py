"""scheduler: the one brain. Admission, batching by slack, and the life of every stream.

In: ``rheo.stream.*.control`` (JetStream), ``rheo.stream.*.motion``, ``rheo.stream.*.chunk`` (ends of sources),
``rheo.stream.*.event`` (ends of streams), ``rheo.pipeline.*.done``, ``rheo.taken``, ``rheo.worker.*.beat``.
Out: ``rheo.<service>.assign``, ``rheo.pipeline.<p>.stage.0``, ``rheo.stream.<id>.frames`` (drops), ``.event``,
``rheo.text.encode``.

Failure policy: one leader by a lease in Redis, standbys wait for it. Queues live in memory: a new leader bumps the term,
fails the streams it finds under way with the reason (egress closes their ledgers), and takes new ones. A service that
misses its beats for 1.5 s, or comes back with a new incarnation, has lost its streams; motion alone resumes from its
mirror. A gap in a pipeline or a batch that does not come back rebuilds the pipeline: live streams go on with a new
first block, lossless ones fail loudly.
"""
