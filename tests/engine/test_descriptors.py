"""A server that may have no more descriptors waits for some, and goes on."""

import os
import socket
import sys
import time
from contextlib import ExitStack

import gevent
import pytest

from tests.clients import connect, request
from tests.support import UNIT, Server, wait_until

LIMIT, CLIENTS = 128, 300

_LIMITED = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
os.execv(sys.argv[1], sys.argv[1:])
"""


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.timeout(4000 * UNIT)
def test_no_more_descriptors() -> None:
    server = Server("example_project/manage.py", "--nostatic")
    server.command = [sys.executable, "-c", _LIMITED, *server.command]
    with server, ExitStack() as stack:
        host, port = "127.0.0.1", server.port
        good = connect(server.address)
        stack.callback(good.close)
        crowd = [socket.create_connection((host, port)) for _ in range(CLIENTS)]
        for sock in crowd:
            stack.callback(sock.close)
        gevent.sleep(10 * UNIT)  # it must have met the limit, and tried again
        before, began = cpu_seconds(server.pid), time.monotonic()
        gevent.sleep(20 * UNIT)
        assert cpu_seconds(server.pid) - before < (time.monotonic() - began) / 5
        assert good.subscribe("x")  # whoever is in is answered
        for sock in crowd:
            sock.close()
        wait_until(lambda: answers(server.address), what="an answer to somebody new")
        assert server.output.count("Too many open files") < 20, server.output


def answers(address: str) -> bool:
    try:
        return request(address, "GET", "/socket.io/?EIO=4&transport=polling").status == 200
    except OSError:
        return False
