"""RabbitMQ, through kombu."""

from .backend import AMQPBackend

__all__ = ["AMQPBackend"]
