"""
What `runserver_socketio --workers` needs before there is any worker, and workers before they serve.

The command has imported the project, and its standard library is not patched, so it is not the one
to fork: it becomes another process, the arbiter, which is told all that it needs.
"""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from django.core.exceptions import ImproperlyConfigured

from .. import runtime
from ..engine.head import MAX_HEADERS
from ..engine.pywsgi import IDLE_TIMEOUT

_ARBITER = """
import json, sys
sys.path[:], *arguments = json.loads(sys.argv.pop())
from django_socketio.gunicorn import ManagedApplication
ManagedApplication(*arguments).run()
"""

_SETTINGS = {
    # As the single process has it.
    "keepalive": int(IDLE_TIMEOUT),
    "limit_request_line": 0,
    "limit_request_fields": MAX_HEADERS,
    # What a proxy says of the scheme is for Django's settings to believe.
    "forwarded_allow_ips": "",
    "accesslog": "-",
    "control_socket_disable": True,
}


def check_backend(workers: int) -> None:
    """Raise `ImproperlyConfigured` if so many workers could not hear each other."""
    backend = runtime.get_hub().backend
    if workers > 1 and not backend.crosses_processes:
        raise ImproperlyConfigured(
            f"SOCKETIO_BACKEND is {type(backend).__name__}, which carries messages inside one"
            f" process only: {workers} workers would not hear each other. Set it to a backend that"
            " crosses processes, such as redis://…, or start one worker."
        )


def installed() -> str:
    """Return gunicorn's version, or nothing."""
    try:
        return version("gunicorn")
    except PackageNotFoundError:
        return ""


def execute(interpreter: list[str], settings: dict[str, Any], options: dict[str, Any]) -> NoReturn:
    """Become the arbiter, with these of gunicorn's settings; `options` are for the workers."""
    arguments = json.dumps([sys.path, _SETTINGS | settings, options])
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(interpreter[0], [*interpreter, "-c", _ARBITER, arguments])
