"""A project as it is deployed: several workers, and senders of every kind, each a process."""
