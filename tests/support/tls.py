"""A TLS listener on loopback in front of a server's unix socket, with a CA of its own."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass
class TlsListener:
    """Where it listens, the file of its CA, and all that clients have sent it."""

    port: int
    ca: Path
    received: list[bytes] = field(default_factory=list)
    failed: int = 0
    """Handshakes that clients have broken off."""


@contextmanager
def tls_listener(directory: Path, path: str) -> Iterator[TlsListener]:
    """Pass what arrives over TLS on to a unix socket, until the end of the block."""
    ca, certificate = _certificates(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = TlsListener(server.getsockname()[1], ca)
        threading.Thread(
            target=_accept, args=(server, context, listener, path), daemon=True
        ).start()
        yield listener
        server.shutdown(socket.SHUT_RDWR)


def _accept(server: socket.socket, context: ssl.SSLContext, it: TlsListener, path: str) -> None:
    with suppress(OSError):
        while True:
            client, _ = server.accept()
            threading.Thread(target=_serve, args=(client, context, it, path), daemon=True).start()


def _serve(client: socket.socket, context: ssl.SSLContext, it: TlsListener, path: str) -> None:
    try:
        secured = context.wrap_socket(client, server_side=True)
    except OSError:
        it.failed += 1
        return
    with secured, socket.socket(socket.AF_UNIX) as upstream, suppress(OSError):
        upstream.connect(path)
        threading.Thread(target=_copy, args=(upstream, secured), daemon=True).start()
        while data := secured.recv(65536):
            it.received.append(data)
            upstream.sendall(data)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


def _certificates(directory: Path) -> tuple[Path, Path]:
    """Make a CA and a certificate for 127.0.0.1; return the files of both."""
    now = datetime.datetime.now(datetime.timezone.utc)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("a CA", "127.0.0.1")
    )

    def sign(subject: x509.Name, public: ec.EllipticCurvePublicKey, ca: bool) -> x509.Certificate:
        builder = x509.CertificateBuilder(ca_name, subject, public, x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return builder.sign(ca_key, hashes.SHA256())

    ca_file, certificate = directory / "ca.pem", directory / "server.pem"
    pem = serialization.Encoding.PEM
    ca_file.write_bytes(sign(ca_name, ca_key.public_key(), ca=True).public_bytes(pem))
    certificate.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + sign(name, key.public_key(), ca=False).public_bytes(pem)
    )
    return ca_file, certificate
