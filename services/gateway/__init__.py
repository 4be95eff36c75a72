"""gateway: the HTTP API. Validates, sends commands, shows what happens. It stands beside the way of a chunk.

In: HTTP; ``rheo.stream.*.event``, ``rheo.stream.*.closed``. Out: ``rheo.stream.<id>.control``; sessions read from Redis.

Failure policy: it holds nothing that is not in Redis or on the bus. When it dies, clients reconnect and streams go on.
"""
