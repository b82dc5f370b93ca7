from typing import Any

from django.core.checks import CheckMessage, Error, Warning
from django.core.exceptions import ImproperlyConfigured

from . import conf, runtime


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Hold every `SOCKETIO_` setting against what it may be."""
    return [Error(sentence, obj=name, id="socketio.E001") for name, sentence in conf.problems()]


def check_origins(**kwargs: Any) -> list[CheckMessage]:
    """Warn, with `--deploy`, of pages of anybody that connect as whoever looks at them."""
    allowed = conf.get("ALLOWED_ORIGINS")
    if allowed != "*" and not (isinstance(allowed, list | tuple) and "*" in allowed):
        return []
    sentence = (
        'SOCKETIO_ALLOWED_ORIGINS has "*": any page may open a WebSocket with the cookies of its'
        " visitor. Name the origins that you trust."
    )
    return [Warning(sentence, obj="SOCKETIO_ALLOWED_ORIGINS", id="socketio.W002")]


def check_backend(**kwargs: Any) -> list[CheckMessage]:
    """Make the backend, without connecting it, and ask it about itself."""
    try:
        backend = runtime.make_backend(conf.get("BACKEND"))
    except ImproperlyConfigured as error:
        return [Error(str(error), obj="SOCKETIO_BACKEND", id="socketio.E002")]
    return [
        Error(problem, obj="SOCKETIO_BACKEND", id="socketio.E003") for problem in backend.check()
    ]


def check_urls(**kwargs: Any) -> list[CheckMessage]:
    """Look for the engine in the URL conf."""
    try:
        runtime.socketio_path()
    except ImproperlyConfigured as error:
        return [Warning(str(error), id="socketio.W001")]
    return []
