"""Messages to systemd, for `Type=notify` and `WatchdogSec=`. Source: sd_notify(3)."""

from __future__ import annotations

import os
import socket


def notify(text: str) -> bool:
    """Send lines of VARIABLE=value; False if nobody listens. Never waits, never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
            # `@`: an abstract name.
            sock.sendto(text.encode(errors="replace"), "\0" + address[1:] if address.startswith("@") else address)
    except OSError:
        return False
    return True
