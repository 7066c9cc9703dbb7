"""The listening socket, which the gateway's processes share."""

import socket

_BACKLOG = 2048


def listen(host: str, port: int, setting: str = "--port") -> socket.socket:
    """Listens first of all: a taken port shows at once, and connections wait for the workers instead of failing.

    Args:
        port: 0 takes a free one.
        setting: what to change where it is taken.

    Raises:
        ValueError: there is no such address here, or it is taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as e:
        listener.close()
        raise ValueError(f"cannot listen on {host}:{port} ({e.strerror}): choose another {setting}") from e
    return listener
