"""Ports for servers of tests."""

import socket


def free_port() -> int:
    """A port of this machine that no server has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
