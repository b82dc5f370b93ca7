class ProtocolError(ValueError):
    """
    The peer sent what the protocol forbids.

    The only error that decoding raises. Its text is for the log: it names the clause that was
    broken and never goes to the peer.
    """
