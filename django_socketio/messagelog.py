"""The log of messages that clients send, a line each, in the format of the settings."""

import logging
from datetime import datetime
from reprlib import Repr
from typing import Any

from django.http import HttpRequest

logger = logging.getLogger(__name__)

_LONGEST = 1000

_short = Repr()
# Of no message is more rendered than is kept, however deep or long a client has made it.
_short.maxlevel = 8
_short.maxlist = _short.maxtuple = _short.maxdict = 50
_short.maxstring = _short.maxother = _short.maxlong = _LONGEST


class _Fields(dict[str, Any]):
    """TIME, TYPE and MESSAGE, and `request.META` behind them; what is in neither is a dash."""

    __slots__ = ("_meta",)

    def __init__(self, meta: dict[str, Any], **fields: Any) -> None:
        super().__init__(fields)
        self._meta = meta

    def __missing__(self, key: str) -> Any:
        return self._meta.get(key, "-")


class MessageLog:
    def __init__(self, format: str) -> None:
        self._format = format

    def __call__(self, request: HttpRequest, type: str, message: Any) -> None:
        if logger.isEnabledFor(logging.INFO):
            fields = _Fields(
                request.META,
                TIME=datetime.now().replace(microsecond=0),
                TYPE=_one_line(type),
                MESSAGE=_one_line(message),
            )
            logger.info("%s", self._format % fields)


def _one_line(message: Any) -> str:
    """Render a message so that it cannot pass for another line of the log."""
    text = message if isinstance(message, str) else _short.repr(message)
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "…"
    return text if text.isprintable() else text.encode("unicode_escape").decode()
