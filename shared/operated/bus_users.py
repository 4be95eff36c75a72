"""Who may publish and subscribe to what on NATS, from the catalog. ``deploy/nats/users.conf`` is written from here."""

from __future__ import annotations

from dataclasses import dataclass

from shared.bus.jetstream import KEPT, kept_stream_of
from shared.contracts.catalog import CHANNELS, Channel, Delivery

SERVICES = ("gateway", "ingest", "motion", "scheduler", "worker", "egress")
PLATFORM = "platform"
USERS = (*SERVICES, PLATFORM)
EVERYBODY = {"every service", "the owner"}
API = "$JS.API"
DOMAIN = "rheocast"
"""JetStream's, of ``deploy/nats/nats.conf``: how a service behind a leaf node names the first host's JetStream."""
LEAF_API = f"$JS.{DOMAIN}.API"
LEAF_USERS = ("worker",)
"""Who runs on a second host."""

HEAD = """# Users of NATS and what each may do: from the catalog, by `python -m shared.operated`. Do not edit.
# Passwords are variables, from a file of secrets. Everybody has an inbox prefix of its own: nobody hears others' replies.
"""
LEAF_HEAD = """# Users of a leaf node, on a second host, from the catalog, by `python -m shared.operated`. Do not edit.
# They may do what they may in users.conf; JetStream is called by its domain.
"""


@dataclass(frozen=True, slots=True)
class Permissions:
    """Subjects with wildcards. ``answers``: may reply, once, to whoever asked."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: bool = False


def inbox_of(user: str) -> str:
    """The prefix of the inboxes of a user; of those without one, and of platforms' plain clients, NATS' own."""
    return "_INBOX" if user in ("", PLATFORM) else f"_INBOX_{user}"


def takes_part(user: str, parties: tuple[str, ...]) -> bool:
    """Whether a user is among a channel's senders or readers."""
    return user in parties or (user in SERVICES and not EVERYBODY.isdisjoint(parties))


def permissions_of(user: str, api: str = API) -> Permissions:
    """What a user may do. ``api``: how it calls JetStream."""
    publish = [channel.subject for channel in CHANNELS if takes_part(user, channel.senders)]
    reads = [channel for channel in CHANNELS if takes_part(user, channel.readers)]
    publish += _stream_api(user, api)
    for channel in reads:
        if channel.delivery is Delivery.JETSTREAM:
            publish += _consumer_api(channel, _filter(user, channel), api)
    if user == PLATFORM:  # integrations look where they like
        return Permissions(tuple(dict.fromkeys(publish)), ("rheo.>", f"{inbox_of(user)}.>"))
    plain = [channel.subject for channel in reads if channel.delivery is not Delivery.JETSTREAM]
    answers = any(channel.delivery is Delivery.REQUEST for channel in reads)
    return Permissions(tuple(dict.fromkeys(publish)), tuple(dict.fromkeys([*plain, f"{inbox_of(user)}.>"])), answers)


def _filter(user: str, channel: Channel) -> str:
    """A service is given its own assignments only."""
    return f"rheo.{user}.assign" if channel.subject == "rheo.*.assign" else channel.subject


def _stream_api(user: str, api: str) -> list[str]:
    """Whoever connects makes what is missing, as after a restart of a server that kept it in memory."""
    if user not in SERVICES:
        return [f"{api}.STREAM.INFO.{kept.name}" for kept in KEPT]
    return [f"{api}.STREAM.{what}.{kept.name}" for kept in KEPT for what in ("CREATE", "INFO")]


def _consumer_api(channel: Channel, wanted: str, api: str) -> list[str]:
    name = kept_stream_of(channel.subject).name
    return [
        f"{api}.CONSUMER.CREATE.{name}.*.{wanted}",
        *(f"{api}.CONSUMER.{what}.{name}.*" for what in ("INFO", "MSG.NEXT", "DELETE")),
        f"$JS.ACK.{name}.>",
    ]


def password_variable(user: str) -> str:
    """The name that the configuration has for a user's password."""
    return f"{user.upper()}_PASSWORD"


def users_conf() -> str:
    """The text of ``deploy/nats/users.conf``."""
    return _conf(HEAD, "secrets/passwords.conf", USERS, API)


def leaf_users_conf() -> str:
    """The text of ``deploy/nats/leaf-users.conf``."""
    return _conf(LEAF_HEAD, "secrets/upstream.conf", LEAF_USERS, LEAF_API)


def _conf(head: str, passwords: str, users: tuple[str, ...], api: str) -> str:
    return (
        f'{head}include "{passwords}"\nauthorization {{\n  users: [\n'
        + "".join(_user(user, api) for user in users)
        + "  ]\n}\n"
    )


def _user(user: str, api: str) -> str:
    may = permissions_of(user, api)
    answers = '        allow_responses: { max: 1, expires: "1m" }\n' if may.answers else ""
    return (
        f"    {{\n      user: {user}\n      password: ${password_variable(user)}\n      permissions {{\n"
        f"        publish {{ allow: {_subjects(may.publish)} }}\n"
        f"        subscribe {{ allow: {_subjects(may.subscribe)} }}\n{answers}      }}\n    }}\n"
    )


def _subjects(subjects: tuple[str, ...]) -> str:
    inner = "".join(f'          "{subject}"\n' for subject in subjects)
    return f"[\n{inner}        ]"
