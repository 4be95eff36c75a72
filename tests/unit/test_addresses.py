"""Addresses that users give: what is refused, whatever its spelling."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from shared.media.addresses import AddressError, AddressRules, check_url, resolve

MEDIA = {"rtmp", "rtsp", "http", "https"}


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f.0.0.1/",
        "http://0177.0.0.1/",
        "http://localhost/",
        "http://localhost./",
        "http://a.localhost/",
        "http://10.0.0.8/",
        "http://192.168.1.1/",
        "http://172.16.3.4/",
        "http://169.254.169.254/latest/meta-data",
        "http://100.64.0.1/",
        "http://[::1]/",
        "http://[fe80::1]/",
        "http://[fd00::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[2002:7f00:0001::]/",
        "rtmp://user:pass@127.0.0.1/live/x",
        "http://example.com@127.0.0.1/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
    ],
)
def test_what_leads_inside_is_refused(url: str) -> None:
    with pytest.raises(AddressError):
        check_url(url, MEDIA)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "concat:a|b",
        "data:video/mp4;base64,AAAA",
        "pipe:0",
        "subfile,,start,0,end,9,,:/etc/passwd",
        "ftp://example.com/x",
        "gopher://example.com/",
        "//example.com/x",
        "example.com/x",
        "",
        "http:///x",
        "http://exa mple.com/",
        "http://example.com/\r\nHost: x",
        "http://example.com\\@127.0.0.1/",
        "http://example.com:99999/",
        "http://" + "a" * 3000,
    ],
)
def test_what_is_no_media_address_is_refused(url: str) -> None:
    with pytest.raises(AddressError):
        check_url(url, MEDIA)


def test_a_public_address_passes() -> None:
    target = check_url("rtmp://live.example.com/app/key", MEDIA)
    assert (target.scheme, target.host, target.port) == ("rtmp", "live.example.com", 1935)
    assert check_url("https://8.8.8.8:8443/a.m3u8", MEDIA).port == 8443


def test_a_public_name_that_leads_inside_is_refused_when_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, 1, 6, "", ("8.8.8.8", 80)), (socket.AF_INET, 1, 6, "", ("10.1.2.3", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    target = check_url("http://rebind.example.com/", MEDIA)
    with pytest.raises(AddressError, match="RHEOCAST_ALLOWED_HOSTS"):
        resolve(target)
    assert resolve(target, AddressRules(private=True)) == ["8.8.8.8", "10.1.2.3"]
    assert resolve(target, AddressRules.of(False, "rebind.example.com")) == ["8.8.8.8", "10.1.2.3"]
    assert resolve(target, AddressRules.of(False, "10.1.0.0/16")) == ["8.8.8.8", "10.1.2.3"]


def test_the_operator_opens_private_networks_but_never_everything() -> None:
    rules = AddressRules(private=True)
    assert check_url("rtsp://192.168.1.20/cam", MEDIA, rules).host == "192.168.1.20"
    assert check_url("http://localhost:8080/", MEDIA, rules).port == 8080
    for url in ("http://0.0.0.0/", "http://224.0.0.1/", "file:///etc/passwd"):
        with pytest.raises(AddressError):
            check_url(url, MEDIA, rules)


def test_a_name_that_nobody_knows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(AddressError, match="no such host"):
        resolve(check_url("http://nowhere.example.com/", MEDIA))
