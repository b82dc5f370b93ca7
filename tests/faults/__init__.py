"""Workers, clients and senders while something breaks, and what must hold all the same."""
