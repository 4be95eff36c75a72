"""Which keys and commands of Redis each service's user has. The ACL file is made from here, with the passwords' hashes.

Keys are what ``shared/session/redis.py`` lists. A session's hash is written by several services, each its own fields
(``Owner``): Redis cannot tell fields apart, so this says who may touch sessions at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "rheo:"
# Connecting, and loading a script that the server has forgotten.
EVERYBODY = (
    *("auth", "hello", "ping", "select", "echo", "client|setname", "client|setinfo", "client|id"),
    *("evalsha", "script|load"),
)
_PUT = ("exists", "hset")
_READ = ("hgetall",)
_TIMED = ("time", "pexpire", "pexpireat", "pttl")
_LEDGER = ("hget", "hset", "hincrby", "sismember", "sadd", "srem", "pexpire", "pttl")
_INDEX = ("zadd", "zrange", "zremrangebyscore", "zrem")
_LEASE = ("hget", "hmget", "hset", "incr", "pexpire", "del")
_NOTES = ("get", "set", "del", "scan")


@dataclass(frozen=True, slots=True)
class Rights:
    """Keys (after the prefix, with wildcards) and commands."""

    keys: tuple[str, ...]
    commands: tuple[str, ...]


RIGHTS: Mapping[str, Rights] = {
    "scheduler": Rights(
        ("stream:*", "index", "ledger:*", "costs:*", "note:drain/*", "lease:scheduler", "term:scheduler"),
        (*_READ, *_PUT, *_TIMED, *_INDEX, *_LEASE, *_NOTES),
    ),
    "gateway": Rights(
        (
            *("stream:*", "index", "ledger:*", "lease:timeline:*", "term:timeline:*"),
            *(
                f"note:{place}"
                for place in (
                    "share-key",
                    "share:*",
                    "idempotency:*",
                    "recording:*",
                    "sinks:*",
                    "timeline:*",
                    "scope:*",
                )
            ),
        ),
        (*_READ, *_INDEX, *_LEASE, *_NOTES, "time"),
    ),
    "ingest": Rights(("stream:*", "ledger:*"), (*_READ, *_PUT)),
    "motion": Rights(("stream:*",), (*_READ, *_PUT)),
    "egress": Rights(("stream:*", "index", "ledger:*"), (*_READ, *_PUT, *_TIMED, *_LEDGER, "zadd")),
    "worker": Rights(("embedding:*",), ("hset", "hmget", "expire", "multi", "exec")),
}


def acl(passwords: Mapping[str, str]) -> str:
    """The ACL file: whoever gives no password may ask whether the server lives, and nothing else."""
    lines = ["user default on nopass resetkeys resetchannels -@all +ping +hello"]
    for user, rights in RIGHTS.items():
        digest = hashlib.sha256(passwords[user].encode()).hexdigest()
        keys = " ".join(f"~{PREFIX}{key}" for key in rights.keys)
        commands = " ".join(f"+{command}" for command in dict.fromkeys((*EVERYBODY, *rights.commands)))
        lines.append(f"user {user} on #{digest} resetchannels {keys} -@all {commands}")
    return "\n".join(lines) + "\n"
