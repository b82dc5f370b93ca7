"""The Redis backend: how it connects, publishes and listens, a module each."""

from .backend import RedisBackend

__all__ = ["RedisBackend"]
