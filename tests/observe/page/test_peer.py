"""Whose connection it is that comes over loopback, whichever family of addresses it has."""

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from ray_ep.observe.page.peer import on_loopback, user_of

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux alone tells it")


def connected(stack, listens, asks):
    """A connection to a server at one address by the name of another: (server's end, client's end)."""
    six = [":" in host for host in (listens, asks)]
    family = [socket.AF_INET6 if it else socket.AF_INET for it in six]
    try:
        server = stack.enter_context(socket.create_server((listens, 0), family=family[0]))
    except OSError as e:
        pytest.skip(f"{listens}: {e.strerror}")
    client = stack.enter_context(socket.socket(family[1]))
    client.connect((asks, server.getsockname()[1]))
    return stack.enter_context(server.accept()[0]), client


@pytest.mark.parametrize(
    ("listens", "asks"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "::ffff:127.0.0.1"), ("::1", "::1")]
)
def test_it_is_the_user_whose_process_has_the_other_end(listens, asks):
    with ExitStack() as stack:
        here, there = connected(stack, listens, asks)
        ends = here.getpeername(), here.getsockname()
        assert on_loopback(*ends)
        assert user_of(*ends) == os.geteuid()
        there.close()
        assert user_of(*ends) is None, "it has gone"


def test_nobody_is_known_of_an_end_that_is_not_there():
    assert user_of(("127.0.0.1", 1), ("127.0.0.1", 2)) is None


@pytest.mark.parametrize("end", [("10.0.0.1", 9), ("fe80::1%eth0", 9, 0, 2), ("::ffff:10.0.0.1", 9), ("", 9), ()])
def test_what_comes_from_elsewhere_is_not_of_this_machine(end):
    assert not on_loopback(end, ("127.0.0.1", 1))
    assert not on_loopback(("127.0.0.1", 1), end)
