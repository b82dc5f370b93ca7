"""Publish from one process as fast as it goes: publish.py CARRIER URL GREENLETS SECONDS

Prints {"rate": publishes per second}. One subscriber, in a process of its own, gets them all.
"""

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import gevent  # noqa: E402

from django_socketio.backends import BaseBackend  # noqa: E402
from django_socketio.runtime import BACKENDS  # noqa: E402

TOPIC = "bench"
PAYLOAD = b"x" * 200


def make(carrier: str, url: str) -> BaseBackend:
    module, _, name = BACKENDS[carrier].rpartition(".")
    backend: BaseBackend = getattr(__import__(module, fromlist=[name]), name)(url)
    return backend


def subscribe(carrier: str, url: str) -> None:
    backend = make(carrier, url)
    backend.start(lambda topic, payload: None)
    backend.subscribe([TOPIC])
    print("ready", flush=True)
    sys.stdin.read()
    backend.stop()


def plain(url: str) -> Callable[[], int]:
    """Return what publishes through redis-py's own client."""
    import redis

    client = redis.Redis.from_url(url)
    return lambda: client.publish(f"plain:{TOPIC}", PAYLOAD)


def main(carrier: str, url: str, greenlets: int, seconds: float) -> None:
    if carrier == "redis-py":
        publish = plain(url)
    else:
        backend = make(carrier, url)
        publish = lambda: backend.publish(TOPIC, PAYLOAD)  # noqa: E731
    print(json.dumps({"rate": rate(publish, greenlets, seconds)}))


def rate(publish: Callable[[], int], greenlets: int, seconds: float) -> float:
    done = 0
    stop = False

    def work() -> None:
        nonlocal done
        while not stop:
            publish()
            done += 1

    workers = [gevent.spawn(work) for _ in range(greenlets)]
    gevent.sleep(min(1.0, seconds / 2))
    before, began = done, time.monotonic()
    while time.monotonic() - began < seconds:
        gevent.sleep(0.05)
    measured = (done - before) / (time.monotonic() - began)
    stop = True
    gevent.joinall(workers)
    return measured


if __name__ == "__main__":
    if sys.argv[1] == "subscribe":
        subscribe(*sys.argv[2:4])
    elif sys.argv[1] in ("redis", "amqp"):
        command = [sys.executable, __file__, "subscribe", *sys.argv[1:3]]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=None
        ) as other:
            os.sched_setaffinity(other.pid, {0})
            other.stdout.readline()
            main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
            other.stdin.close()
    else:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
