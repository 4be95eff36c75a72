"""NATS by TLS, with the file that ships: what another host connects to."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shared.bus.nats import NatsBus
from shared.bus.port import BusUnavailableError
from shared.credentials import Credentials
from tests.support.operated import Operated, replaced

pytestmark = pytest.mark.integration


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nats")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(pem)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operated, Path]]:
    """NATS by TLS, and who vouches for it."""
    folder = tmp_path_factory.mktemp("tls")
    made = Operated(folder)
    cert, key = certificate(folder)
    made.nats_conf = folder / "nats" / "tls.conf"
    made.nats_conf.write_text(
        replaced(
            made.nats_conf.read_text(),
            ("/run/secrets/tls_cert", str(cert)),
            ("/run/secrets/tls_key", str(key)),
        )
    )
    try:
        made.start("nats")
        yield made, cert
    finally:
        made.stop("nats")


async def test_the_server_proves_who_it_is_and_asks_who_comes(servers: tuple[Operated, Path]) -> None:
    front, cert = servers
    url = front.nats_url.replace("nats://", "tls://")
    who = front.bus("worker")
    bus = await NatsBus.connect(url, credentials=replace(who, ca=cert))
    assert bus.connected
    await bus.close()
    tries = (
        NatsBus.connect(url, credentials=who),
        NatsBus.connect(front.nats_url, credentials=who),
        NatsBus.connect(url, credentials=Credentials("worker", "wrong", cert)),
    )
    for outcome in await asyncio.gather(*tries, return_exceptions=True):
        assert isinstance(outcome, BusUnavailableError)


def test_an_authority_that_is_not_there_is_told_by_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RHEOCAST_TLS_CA"):
        Credentials.of("worker", None, tmp_path / "ca.pem")
