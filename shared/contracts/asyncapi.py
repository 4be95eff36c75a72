"""``docs/asyncapi.yaml`` from the catalog: ``python -m shared.contracts.asyncapi [file]``.

The document is JSON, which is YAML as well: nothing beyond the standard library writes it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, cast

from shared.contracts.catalog import CHANNELS, Channel, Delivery
from shared.contracts.refs import Wire

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "asyncapi.yaml"

# Names of the wildcard tokens of a subject, by the token before them.
_PARAMETERS = {
    "stream": "stream",
    "pipeline": "pipeline",
    "stage": "stage",
    "worker": "instance",
    "tensor": "owner",
    "rheo": "service",
}
_DELIVERY = {
    Delivery.CORE: "Core NATS, at most once.",
    Delivery.JETSTREAM: "JetStream: kept, acknowledged by the reader, at least once.",
    Delivery.REQUEST: "Request and reply.",
}


def _address(channel: Channel) -> tuple[str, list[str]]:
    words = channel.subject.split(".")
    parameters: list[str] = []
    for index, word in enumerate(words):
        if word == "*":
            parameters.append(_PARAMETERS[words[index - 1]])
            words[index] = f"{{{parameters[-1]}}}"
    return ".".join(words), parameters


def _channel_id(channel: Channel) -> str:
    return re.sub(r"\W+", "_", channel.subject.replace("*", "any")).strip("_")


def _by_property(node: Any) -> None:
    """Discriminators as AsyncAPI has them: the property's name and nothing else. OpenAPI's are objects."""
    if isinstance(node, dict):
        told = cast(dict[str, Any], node)
        if isinstance(told.get("discriminator"), dict):
            told["discriminator"] = told["discriminator"]["propertyName"]
        for value in told.values():
            _by_property(value)
    elif isinstance(node, list):
        for value in cast(list[Any], node):
            _by_property(value)


def _schema(message: type[Wire], schemas: dict[str, Any]) -> str:
    """Add a message's JSON schema, and those it needs, to ``schemas``; the reference to it."""
    schema = message.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    for name, needed in schema.pop("$defs", {}).items():
        schemas.setdefault(name, needed)
    schemas[message.__name__] = schema
    return f"#/components/schemas/{message.__name__}"


def _message(message: type[Wire], schemas: dict[str, Any]) -> dict[str, Any]:
    summary, _, rest = (message.__doc__ or "").strip().partition("\n\n")
    described: dict[str, Any] = {
        "name": message.__name__,
        "contentType": "application/msgpack",
        "summary": " ".join(summary.split()),
        "payload": {"$ref": _schema(message, schemas)},
        "headers": {"$ref": "#/components/schemas/TraceHeaders"},
    }
    if rest:
        described["description"] = " ".join(rest.split())
    return described


def document() -> dict[str, Any]:
    """The AsyncAPI 3.0 document of every subject and message."""
    schemas: dict[str, Any] = {
        "TraceHeaders": {
            "type": "object",
            "properties": {"traceparent": {"type": "string", "description": "W3C trace context, when traced."}},
        }
    }
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    for channel in CHANNELS:
        name = _channel_id(channel)
        address, parameters = _address(channel)
        for message in (*channel.messages, *channel.replies):
            messages[message.__name__] = _message(message, schemas)
        names = [message.__name__ for message in (*channel.messages, *channel.replies)]
        channels[name] = {
            "address": address,
            "description": f"{_DELIVERY[channel.delivery]} From {', '.join(channel.senders)} to {', '.join(channel.readers)}.",
            "messages": {each: {"$ref": f"#/components/messages/{each}"} for each in names},
            "x-delivery": channel.delivery.value,
            "x-senders": list(channel.senders),
            "x-readers": list(channel.readers),
        }
        if parameters:
            channels[name]["parameters"] = {each: {"$ref": f"#/components/parameters/{each}"} for each in parameters}
        operation: dict[str, Any] = {
            "action": "send",
            "channel": {"$ref": f"#/channels/{name}"},
            "messages": [{"$ref": f"#/channels/{name}/messages/{each.__name__}"} for each in channel.messages],
        }
        if channel.replies:
            operation["reply"] = {
                "messages": [{"$ref": f"#/channels/{name}/messages/{each.__name__}"} for each in channel.replies]
            }
        operations[f"send_{name}"] = operation
    _by_property(schemas)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Rheocast",
            "version": "1.0.0",
            "description": "Every message between the services, and those a platform may read or send. Payloads are "
            "MessagePack maps told apart by `kind`; unknown fields are ignored, so contracts only grow. "
            "Generated from shared/contracts/catalog.py: do not edit.",
        },
        "defaultContentType": "application/msgpack",
        "servers": {"nats": {"host": "127.0.0.1:4222", "protocol": "nats"}},
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": dict(sorted(messages.items())),
            "schemas": dict(sorted(schemas.items())),
            "parameters": {
                each: {"description": f"The {each}: 1–64 letters, digits, '-' or '_'."}
                for each in sorted(set(_PARAMETERS.values()))
            },
        },
    }


def render() -> str:
    """The document as text, the same for the same catalog."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> None:
    """Write the document."""
    path = Path(arguments[0]) if arguments else DOCUMENT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
