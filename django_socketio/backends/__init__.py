"""Carriers of bytes between processes: `base` has the contract, one module each a backend."""

from .base import BaseBackend, Deliver
from .exceptions import BackendError, InvalidBackend

__all__ = ["BackendError", "BaseBackend", "Deliver", "InvalidBackend"]
