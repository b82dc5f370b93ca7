"""What every kind of process does: call a function of the API by its name, and tell the outcome."""

import django_socketio


def attempt(name, *args, **kwargs):
    """Return what the function returns, or the name of what it raises."""
    try:
        return getattr(django_socketio, name)(*args, **kwargs)
    except django_socketio.NoSocket:
        return "NoSocket"
    except django_socketio.BackendError:
        return "BackendError"
