import json
import multiprocessing
import os
import subprocess
import sys
import time

import gevent
from django.core.exceptions import PermissionDenied

from django_socketio import BackendError, broadcast_channel, runtime
from django_socketio.events import on_event, on_finish, on_subscribe
from django_socketio.runtime import get_hub
from tests.deployment.sender import attempt


@on_event("fence")
def fence(request, socket, context):
    return ()


@on_event("whoami")
def whoami(request, socket, context):
    return os.getpid()


@on_event("sleep")
def sleep(request, socket, context, seconds):
    time.sleep(seconds)
    return "slept"


@on_event("who")
def who(request, socket, context):
    return [request.user.get_username(), request.user.is_staff]


@on_subscribe(channel="^staff$")
def staff(request, socket, context, channel):
    if not request.user.is_staff:
        raise PermissionDenied("staff only")


@on_event("wait for")
def wait_for(request, socket, context, path):
    while not os.path.exists(path):
        time.sleep(0.05)
    return "done"


@on_event("publish")
def publish(request, socket, context, channel, message):
    """Send to everybody in a channel; the ack says whether that went well."""
    return attempt("broadcast_channel", message, channel) or "sent"


@on_event("flood")
def flood(request, socket, context, channel, start, count):
    """Send numbered messages of 1 KB to everybody in a channel."""
    for number in range(start, start + count):
        broadcast_channel(f"{number:0>10}" + "x" * 1000, channel)
        if number % 100 == 0:
            time.sleep(0)
    return "sent"


@on_event("call")
def call(request, socket, context, name, *args):
    """Call a function of the API; the ack is its result, or the name of what it raised."""
    return attempt(name, *args)


@on_event("members")
def members(request, socket, context, channel):
    return list(attempt("members", channel))


@on_event("enrol")
def enrol(request, socket, context, sid, channel):
    return attempt("subscribe", sid, channel) or "done"


@on_event("disconnect_other")
def disconnect(request, socket, context, sid):
    return attempt("disconnect", sid) or "done"


def child(output, channel, seconds):
    """What a child process does: it waits, publishes, and tells what it is."""
    time.sleep(seconds)
    outcome = attempt("broadcast_channel", ["child", 1], channel) or "sent"
    node = runtime.get_cluster().node
    dispatcher = runtime.get_dispatcher() is not None
    runtime.stop()
    os.write(output, json.dumps([os.getpid(), node, dispatcher, outcome]).encode())


@on_event("fork")
def fork(request, socket, context, kind, channel, seconds):
    """Have a child that lives for some seconds; return what it says, and who this process is."""
    me = [os.getpid(), runtime.get_cluster().node]
    if kind == "subprocess":
        source = f"import time; time.sleep({seconds}); print(1)"
        command = [sys.executable, "-c", source]
        return [*me, subprocess.run(command, capture_output=True).stdout.decode()]
    end, output = os.pipe()
    if kind == "multiprocessing":
        context = multiprocessing.get_context("fork")
        process = context.Process(target=child, args=(output, channel, seconds))
        process.start()
        process.join()
    elif not (pid := os.fork()):
        child(output, channel, seconds)
        os._exit(0)
    else:
        os.waitpid(pid, 0)
    result = json.loads(os.read(end, 1000))
    os.close(output)
    os.close(end)
    return [*me, result]


@on_event("block")
def block(request, socket, context, how, seconds):
    """Wait, as one should, or work, as one should not."""
    if how == "wait":
        gevent.sleep(seconds)
    until = time.monotonic() + seconds
    while how == "work" and time.monotonic() < until:
        pass


@on_finish
def finish(request, socket, context):
    line = f"finished {socket.session.session_id} {socket.disconnect_reason}\n"
    print(line, end="", flush=True)  # at once, as all workers write to one file


@on_event("inject")
def inject(request, socket, context, topic, payload, times=1):
    """Put bytes on the carrier as a stranger could; several at once, or many of the same."""
    for each in payload if isinstance(payload, list) else [payload]:
        try:
            get_hub().backend.publish(topic, each * times)
        except BackendError:
            return "BackendError"
    return "sent"
