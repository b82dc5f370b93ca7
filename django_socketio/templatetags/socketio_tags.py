from typing import Any

from django import template
from django.urls import NoReverseMatch, reverse

register = template.Library()


@register.inclusion_tag("django_socketio/scripts.html")
def socketio() -> dict[str, Any]:
    """Load the bundled client and its extension: `{% load socketio_tags %}{% socketio %}`."""
    try:
        path = reverse("socketio")
    except NoReverseMatch:  # another process serves it, at its usual path
        path = "/socket.io/"
    return {"path": path}
