"""Carriers of bytes between processes: `base` has the contract, one module each a backend."""

from .base import UNKNOWN, BaseBackend, Deliver
from .exceptions import BackendError, InvalidBackend

__all__ = ["UNKNOWN", "BackendError", "BaseBackend", "Deliver", "InvalidBackend"]
