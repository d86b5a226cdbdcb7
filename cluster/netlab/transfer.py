"""Bandwidth of a link: one TCP connection that is kept full for some seconds. Standard library only.

`transfer.py receive SECONDS` prints the port it listens on, then bit/s; `transfer.py send ADDRESS PORT` fills it.
"""

from __future__ import annotations

import socket
import sys
import time

CHUNK = 1 << 16


def receive(seconds: float) -> None:
    """Count what comes from a sender; the first fifth of the time, with its bursts and slow start, does not count."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        server.settimeout(30)
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(30)
        buffer = bytearray(CHUNK)
        began, first, count, now = time.monotonic(), 0.0, 0, 0.0
        while not first or now < began + seconds:
            got = connection.recv_into(buffer)
            now = time.monotonic()
            if first:
                count += got
            elif now > began + seconds / 5:
                first = now
            if not got:
                raise SystemExit("the sender has gone")
    print(8 * count / (now - first), flush=True)


def send(address: str, port: int) -> None:
    """Send until the receiver has had enough."""
    chunk = bytes(CHUNK)
    with socket.create_connection((address, port), timeout=3) as connection:
        while True:
            try:
                connection.sendall(chunk)
            except (ConnectionResetError, BrokenPipeError):
                return


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(float(sys.argv[2]))
    else:
        send(sys.argv[2], int(sys.argv[3]))
