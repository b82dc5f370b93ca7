"""JSON as both protocols carry it: orjson, with one hook for what JSON has no word for."""

import json as stdlib
import re
from collections.abc import Callable
from math import isinf
from typing import Any

import orjson

from .exceptions import LimitExceeded, ProtocolError

Default = Callable[[Any], Any]
"""Return something serialisable for a value that is not, or raise `TypeError`."""

# Dates are left to the hook, which renders them as the framework does elsewhere; keys that are
# not strings become strings, as in the standard library.
_OPTIONS = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_NON_STR_KEYS


def refuse(value: Any) -> Any:
    """Be the hook of those who send plain JSON only."""
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def dumps(value: Any, default: Default = refuse) -> bytes:
    """Encode `value` as UTF-8 JSON. Raise `TypeError` for what neither JSON nor `default` knows."""
    return orjson.dumps(value, default=default, option=_OPTIONS)


def dumps_binary(value: Any, default: Default = refuse) -> tuple[bytes, list[bytes]]:
    """
    Encode `value`, taking every bytes-like object in it out as an attachment.

    Return the JSON, with `{"_placeholder": true, "num": n}` in the place of attachment `n`, and
    the attachments in that order (Socket.IO protocol v5, "Packet encoding").
    """
    try:
        return orjson.dumps(value, None, _OPTIONS), []
    except TypeError:
        pass  # there is more in it than plain JSON, which most messages are
    attachments: list[bytes] = []

    def extract(item: Any) -> Any:
        if isinstance(item, bytes | bytearray | memoryview):
            attachments.append(bytes(item))
            return {"_placeholder": True, "num": len(attachments) - 1}
        if isinstance(item, tuple):  # a named tuple: orjson takes plain ones only
            return list(item)
        if isinstance(item, float):  # of a class of its own, such as numpy's
            return float(item)
        return default(item)

    try:
        return orjson.dumps(value, default=extract, option=_OPTIONS), attachments
    except TypeError:
        attachments.clear()
        return _dumps_more(value, extract), attachments


def _dumps_more(value: Any, default: Default) -> bytes:
    """Encode what orjson does not take but others do: great integers, half of a surrogate pair."""
    try:
        return stdlib.dumps(value, default=default, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise TypeError(f"cannot be serialised: {error}") from None


def loads(text: str | bytes) -> Any:
    """Decode JSON. Raise `ProtocolError` for anything else, endless nesting included."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if isinstance(text, str) and _SURROGATE.search(text):
            return _loads_surrogates(text)
        raise ProtocolError(f"invalid JSON: {error}") from None


def check_depth(text: str, value: Any, maximum: int) -> None:
    """
    Raise `LimitExceeded` if more than `maximum` arrays and objects of `value` are in each other.

    `text` is the JSON that it was decoded from: few brackets in it spare a look at the value, and
    a few plain arguments, such as one long string, spare a look at the text.
    """
    if type(value) is list and len(value) < 8:
        for item in value:
            if type(item) is dict or type(item) is list:
                break
        else:
            return
    if text.count("[") + text.count("{") > maximum and _is_deeper(value, maximum):
        raise LimitExceeded("MAX_JSON_DEPTH", f"JSON of more than {maximum} levels")


def _is_deeper(value: Any, maximum: int) -> bool:
    """Walk level by level, without recursion: the depth is the peer's choice."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(maximum):
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return False
    return True


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _loads_surrogates(text: str) -> Any:
    """Decode what may have half a surrogate pair, as of a string that was cut in an emoji."""
    try:
        return stdlib.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"invalid JSON: {error}") from None


def _finite(digits: str) -> float:
    number = float(digits)
    if isinf(number):
        raise ValueError(f"{digits:.20} is too great for a float")
    return number


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
