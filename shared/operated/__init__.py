"""NATS and Redis as operated: a user for each service, what it may do there, and its passwords.

``python -m shared.operated prepare DIR`` makes the secrets; ``… nats-users`` writes ``deploy/nats/users.conf``.
"""
