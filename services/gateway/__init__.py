"""gateway: the HTTP API. Validates, sends commands, shows what happens. It stands beside the way of a chunk.

In: HTTP; ``rheo.stream.*.event``, ``.closed``; of streams that somebody looks at ``.out``, ``.preview``, ``.frames``.
Out: ``rheo.stream.<id>.control``, ``.looking``, ``.push``; sessions are read from Redis, its own notes are kept there.

Failure policy: it holds nothing that is not in Redis or on the bus. When it dies, clients reconnect and streams go on.
"""
