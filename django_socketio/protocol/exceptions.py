class ProtocolError(ValueError):
    """
    The peer sent what the protocol forbids.

    The only error that decoding raises. Its text is for the log: it names the clause that was
    broken and never goes to the peer.
    """


class LimitExceeded(ProtocolError):
    """The peer sent more than it may. `limit` is the name of the setting that says how much."""

    def __init__(self, limit: str, text: str) -> None:
        super().__init__(text)
        self.limit = limit
