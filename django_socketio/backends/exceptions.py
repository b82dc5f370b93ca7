class BackendError(Exception):
    """The carrier could not be reached in time, or refused."""


class InvalidBackend(ValueError):
    """The backend that the settings name does not exist, or does not know an option."""
