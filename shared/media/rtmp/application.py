"""What an RTMP address says beside the host: application and key."""

from __future__ import annotations

from urllib.parse import urlsplit

from shared.media.addresses import Target


def application_of(url: str) -> tuple[str, str]:
    """Application and key: of three parts or more the application has two, as FFmpeg and others read it."""
    parts = urlsplit(url)
    names = parts.path.strip("/").split("/")
    count = 2 if len(names) > 2 else 1
    query = f"?{parts.query}" if parts.query else ""
    return "/".join(names[:count]), "/".join(names[count:]) + query


def tc_url(target: Target) -> str:
    """What the server is told that it was called: it may serve several names."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    return f"{target.scheme}://{host}:{target.port}/{application_of(target.url)[0]}"
