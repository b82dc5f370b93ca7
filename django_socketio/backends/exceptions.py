class BackendError(Exception):
    """The carrier could not be reached, or refused: nothing was sent."""


class InvalidBackend(ValueError):
    """The backend that the settings name does not exist, or does not know an option."""
