"""TLS on the gateway's listeners: certificates that change while it runs, and connections that are encrypted.

A connection counts from the moment it is accepted, so that a handshake that never ends is under the same limits as a
head that never comes; the event loops' own TLS begins to tell of a connection after its handshake, and keeps a buffer
of 256 KiB for each.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serving.gateway import watch
from serving.gateway.operations import Tls

if TYPE_CHECKING:
    from serving.gateway.connection import Connection

logger = logging.getLogger("medassist.edge")

# Forward secrecy and authenticated encryption only; TLS 1.3 has nothing else.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_RECORD = 16_384  # most bytes of one TLS record
_HANDSHAKE = b"\x16"  # what a client that speaks TLS begins with


def create_context(tls: Tls) -> ssl.SSLContext:
    """A server's context.

    Raises:
        ValueError: a file cannot be used; says which, and why.
    """
    assert tls.certificate is not None
    assert tls.key is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])

    def no_password() -> str:  # instead of asking on the terminal
        raise ValueError(f"tls.key: {tls.key} is encrypted: give a key without a passphrase")

    for setting, path in (("certificate", tls.certificate), ("key", tls.key), ("client_ca", tls.client_ca)):
        try:
            if path is not None:
                with path.open("rb"):
                    pass
        except OSError as e:
            raise ValueError(f"tls.{setting}: {path} cannot be read ({e.strerror})") from None
    try:
        context.load_cert_chain(tls.certificate, tls.key, no_password)
    except ssl.SSLError as e:
        what = e.reason or "not PEM"
        raise ValueError(f"tls.certificate and tls.key: {tls.certificate} and {tls.key} are no pair ({what})") from None
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(tls.client_ca)
        except ssl.SSLError as e:
            raise ValueError(f"tls.client_ca: {tls.client_ca} holds no certificates ({e.reason})") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class Certificates:
    """The files of :class:`serving.gateway.operations.Tls`, read again when they change.

    Attributes:
        context: for new connections.
    """

    def __init__(self, tls: Tls) -> None:
        """Raises ValueError where they cannot be used."""
        self._tls = tls
        self._stamps = self._before = self._look()
        self.context = create_context(tls)

    def _look(self) -> tuple[watch.Stamp | None, ...]:
        files = (self._tls.certificate, self._tls.key, self._tls.client_ca)
        return tuple(watch.stamp(file) for file in files if file is not None)

    def refresh(self, settled: bool = True) -> bool:
        """Reads the files if they have changed.

        Args:
            settled: leave them alone until two looks have seen the same, as somebody may still be writing.

        Returns:
            Whether ``context`` is new.

        Raises:
            ValueError: they cannot be used; the old ones stay. Raised once for each change.
        """
        now = self._look()
        same, self._before = now == self._before, now
        if now == self._stamps or (settled and not same):
            return False
        self._stamps = now
        self.context = create_context(self._tls)
        return True


async def keep_fresh(
    certificates: Certificates, report: Callable[[str], None], asked: asyncio.Event, interval: float = 1.0
) -> None:
    """Reads certificates again when their files have changed, or at once when ``asked``; until cancelled."""
    while True:
        hurry = True
        try:
            await asyncio.wait_for(asked.wait(), interval)
            asked.clear()
        except TimeoutError:
            hurry = False
        try:
            if certificates.refresh(settled=not hurry):
                report("has a new TLS certificate")
        except ValueError as e:
            report(f"the new TLS files are not valid, the old ones stay: {e}")
        except Exception as e:
            logger.error("%s while the TLS files were read", type(e).__name__)


class Tunnel(asyncio.Protocol):
    """Between a socket and a :class:`serving.gateway.connection.Connection`: a protocol for the one, the transport of
    the other. A client that does not speak TLS gets an answer that it can read."""

    __slots__ = ("_begun", "_connection", "_incoming", "_open", "_outgoing", "_plain", "_raw", "_tls")

    _raw: Any
    _connection: "Connection"

    def __init__(self, connection: "Connection", context: ssl.SSLContext) -> None:
        self._connection = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._begun = self._open = False  # something has come; the handshake is done
        self._plain = False  # the client speaks no TLS

    # For the socket.

    def connection_made(self, transport: Any) -> None:
        self._raw = transport
        self._connection.connection_made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def data_received(self, data: bytes) -> None:
        connection = self._connection
        if connection.deaf:  # what comes is dropped, and need not be read for that
            connection.data_received(data)
            return
        if not self._begun:
            self._begun = True
            if data[:1] != _HANDSHAKE:
                self._plain = True
                connection.refuse(400, "this port speaks TLS: use https://", "invalid_request", "malformed")
                return
        self._incoming.write(data)
        try:
            if not self._open:
                self._tls.do_handshake()
                self._open = True
                self._flush()
            incoming, read = self._incoming, self._tls.read
            while True:
                piece = read(_RECORD)
                if not piece:
                    break
                connection.data_received(piece)
                if not incoming.pending or connection.deaf:
                    return
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLZeroReturnError:
            pass
        except ssl.SSLError:
            if not self._open:
                connection.server.refused("tls")
            self._flush()  # says why
        self.close()  # the client has closed its side, which counts as gone, or has broken the protocol

    def _flush(self) -> None:
        if self._outgoing.pending and not self._raw.is_closing():
            self._raw.write(self._outgoing.read())

    # For the connection.

    def write(self, data: bytes) -> None:
        if self._plain:
            self._raw.write(data)
        elif not self._raw.is_closing() and data:
            self._tls.write(data)
            self._raw.write(self._outgoing.read())

    def _say_end(self) -> None:
        if not self._open or self._raw.is_closing():
            return
        with contextlib.suppress(ssl.SSLError):  # the other side's end is not waited for
            self._tls.unwrap()
        self._flush()

    def close(self) -> None:
        self._say_end()
        self._raw.close()

    def write_eof(self) -> None:
        self._say_end()
        self._raw.write_eof()

    def abort(self) -> None:
        self._raw.abort()

    def is_closing(self) -> bool:
        closing: bool = self._raw.is_closing()
        return closing

    def pause_reading(self) -> None:
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        self._raw.resume_reading()

    def get_write_buffer_size(self) -> int:
        size: int = self._raw.get_write_buffer_size()
        return size

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._raw.get_extra_info(name, default)
