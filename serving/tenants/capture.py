"""Break-glass capture: the bodies of one key's requests, for one pair of eyes, for a short time.

Bodies are encrypted for the recipient of the order, whose private key this machine never has: nobody here can read
them again, not even this process. A file holds one request: a line of JSON (who, what, and the public half of a pair
of X25519 keys that was made for this file alone), then frames: four bytes of length, and ChaCha20-Poly1305 of a byte
that says what it is, and the content. HKDF-SHA256 makes the frames' key of what the two keys share. The header, and the
frame's number, are authenticated with each frame: none can be changed, exchanged, left out or taken to another file.
The last frame says how the request ended; a file without it has lost its end.

One thread of a process encrypts and writes; the event loop only puts bodies into its queue.
"""

import os
import queue
import re
import secrets
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

LONGEST = 86_400.0  # seconds that a capture may take
MAX_FILE = 64 * 2**20  # bytes of a request's bodies, in a file
MAX_CAPTURE = 2**30  # bytes of a capture's files, after which there are no more
MAX_WAITING = 64 * 2**20  # bytes in the queue
REQUEST, ANSWER, END = b"Q", b"A", b"E"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_VERSION = "medassist-capture-1"


@dataclass(slots=True)
class CaptureOrder:
    """Leave to capture.

    Attributes:
        id: of the capture; the name of its folder.
        key: id of the key whose requests are captured.
        recipient: X25519 public key, 64 hexadecimal digits.
        expires: seconds since the epoch; past it nothing is captured, whether or not the store can be asked.
        ended: it was stopped before; requests that are being recorded see it here.
    """

    id: str
    key: str
    recipient: str
    expires: float
    ended: bool = False

    @property
    def open(self) -> bool:
        """Whether it holds still."""
        return not self.ended and time.time() < self.expires


class Recorder:
    """Of one request's bodies. Its methods return at once and raise nothing; what cannot be written is missing in the
    file, which says so.

    Args:
        folder: ``home/captures``.
    """

    __slots__ = ("_cut", "_file", "_order", "_size")

    def __init__(self, order: CaptureOrder, folder: Path, request_id: str) -> None:
        self._order = order
        self._file = _File(order, folder, request_id)
        self._size = 0
        self._cut = False

    def request(self, body: bytes) -> None:
        """The request, whole."""
        self._put(REQUEST, body)

    def answer(self, data: bytes) -> None:
        """A piece of the answer."""
        self._put(ANSWER, data)

    def close(self, status: int) -> None:
        """The request has ended."""
        end = {"status": status, "time": round(time.time(), 3), "cut": self._cut}
        _writer.put(self._file, END, orjson.dumps(end))

    def _put(self, kind: bytes, data: bytes) -> None:
        if self._cut or not data:
            return
        self._size += len(data)
        if self._size > MAX_FILE or not self._order.open or not _writer.put(self._file, kind, data):
            self._cut = True


@dataclass(slots=True, eq=False)
class _File:
    """A recorder's file, as the thread has it: opened with its first content."""

    order: CaptureOrder
    folder: Path
    request_id: str
    fd: int = -1
    cipher: Any = None
    header: bytes = b""
    frames: int = 0
    failed: bool = False

    def write(self, kind: bytes, data: bytes) -> None:
        if self.failed:
            return
        try:
            if self.fd < 0:
                if kind == END:  # nothing was captured
                    return
                self._open()
            self._put(_seal(self.cipher, self.header, self.frames, kind, data))
            self.frames += 1
        except (OSError, ValueError):
            self.failed = True  # the file has no end, which its reader says
        if self.failed or kind == END:
            self._close()

    def _open(self) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        check_id(self.order.id)
        folder = self.folder / self.order.id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sum(entry.stat().st_size for entry in os.scandir(folder)) > MAX_CAPTURE:
            raise ValueError("the capture is as large as it may get")
        name = self.request_id if _REQUEST_ID.fullmatch(self.request_id) else "request"
        pair = X25519PrivateKey.generate()
        header = {
            "format": _VERSION,
            "capture": self.order.id,
            "request": self.request_id,
            "key": self.order.key,
            "time": round(time.time(), 3),
            "public": pair.public_key().public_bytes_raw().hex(),
        }
        self.header = orjson.dumps(header) + b"\n"
        self.cipher = _cipher(pair, bytes.fromhex(self.order.recipient))
        fd = os.open(
            folder / f"{name[:100]}-{secrets.token_hex(4)}.capture",
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
            0o600,
        )
        self.fd = fd
        self._put(self.header)

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.fd, rest) :]

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Writer:
    """The thread, which starts with the first content and does not keep the process from ending."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[_File, bytes, bytes] | threading.Event] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._waiting = 0

    def put(self, file: _File, kind: bytes, data: bytes) -> bool:
        """False: there is no room, and it was dropped. Ends always have room."""
        with self._lock:
            if kind != END and self._waiting + len(data) > MAX_WAITING:
                return False
            self._waiting += len(data)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
            self._thread.start()
        self._queue.put((file, kind, data))
        return True

    def flush(self, seconds: float) -> None:
        """Returns when all that was put is written, or after so many seconds."""
        if self._thread is not None:
            done = threading.Event()
            self._queue.put(done)
            done.wait(seconds)

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            file, kind, data = item
            file.write(kind, data)
            with self._lock:
                self._waiting -= len(data)


_writer = _Writer()


def flush(seconds: float) -> None:
    """Waits until what was recorded is written, at most so many seconds: at the end of a worker."""
    _writer.flush(seconds)


def check_id(capture: str) -> None:
    """
    Raises:
        ValueError: it cannot be a capture's id.
    """
    if not _ID.fullmatch(capture):
        raise ValueError("a capture's id has letters, digits, _ and - only")


def check_recipient(recipient: str) -> None:
    """
    Raises:
        ValueError: it is not a public key that bodies can be encrypted for.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", recipient):
        raise ValueError(
            "the recipient is a public key of 64 hexadecimal digits: medassist capture keygen FILE prints it"
        )
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(recipient)))
    except ValueError:
        raise ValueError("the recipient is a point of low order: anybody could read what is encrypted for it") from None


def new_pair() -> tuple[str, str]:
    """A private and a public X25519 key, 64 hexadecimal digits each."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    pair = X25519PrivateKey.generate()
    return pair.private_bytes_raw().hex(), pair.public_key().public_bytes_raw().hex()


@dataclass(frozen=True, slots=True)
class Captured:
    """A file's content.

    Attributes:
        header: ``capture``, ``request`` and ``key`` (ids), ``time`` (seconds since the epoch).
        request, answer: bodies, as far as they were captured.
        end: ``status``, ``time`` and ``cut`` (whether something is missing); None: the file has lost its end.
    """

    header: dict[str, Any]
    request: bytes
    answer: bytes
    end: dict[str, Any] | None


def read(path: Path, private: str) -> Captured:
    """Decrypts a file.

    Args:
        private: of the recipient, 64 hexadecimal digits.

    Raises:
        ValueError: it is for somebody else, or was changed.
        OSError: it cannot be read.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    with path.open("rb") as file:
        head = file.readline(4096)
        try:
            header = orjson.loads(head)
            if header["format"] != _VERSION:
                raise ValueError
            public = bytes.fromhex(header["public"])
            pair = X25519PrivateKey.from_private_bytes(bytes.fromhex(private))
            shared = pair.exchange(X25519PublicKey.from_public_bytes(public))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a captured request, or the private key is not one") from None
        cipher = _derive(shared, public, pair.public_key().public_bytes_raw())
        parts: dict[bytes, list[bytes]] = {REQUEST: [], ANSWER: [], END: []}
        try:
            for number, sealed in enumerate(_frames(file)):
                content = cipher.decrypt(_nonce(number), sealed, head + _number(number))
                parts[content[:1]].append(content[1:])
        except (InvalidTag, KeyError):
            raise ValueError(f"{path}: it was changed, or is for another recipient") from None
    end = orjson.loads(parts[END][0]) if parts[END] else None
    del header["format"], header["public"]
    return Captured(header, b"".join(parts[REQUEST]), b"".join(parts[ANSWER]), end)


def _cipher(pair: Any, recipient: bytes) -> Any:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    public = pair.public_key().public_bytes_raw()
    return _derive(pair.exchange(X25519PublicKey.from_public_bytes(recipient)), public, recipient)


def _derive(shared: bytes, public: bytes, recipient: bytes) -> Any:
    """The cipher for a file, of what its key and the recipient's share."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return ChaCha20Poly1305(HKDF(SHA256(), 32, salt=public + recipient, info=_VERSION.encode()).derive(shared))


def _seal(cipher: Any, header: bytes, number: int, kind: bytes, data: bytes) -> bytes:
    sealed: bytes = cipher.encrypt(_nonce(number), kind + data, header + _number(number))
    return struct.pack(">I", len(sealed)) + sealed


def _nonce(number: int) -> bytes:
    """Never used twice with one key: each file has its own."""
    return struct.pack(">4xQ", number)


def _number(number: int) -> bytes:
    return struct.pack(">Q", number)


def _frames(file: IO[bytes]) -> Iterator[bytes]:
    """Whole ones; what is behind the last whole one was being written when the process died."""
    while len(length := file.read(4)) == 4:
        (size,) = struct.unpack(">I", length)
        if size > MAX_FILE + 64 or len(sealed := file.read(size)) < size:
            return
        yield sealed
