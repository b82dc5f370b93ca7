from django.conf import settings
from django.shortcuts import get_object_or_404, redirect, render

from chat.forms import JoinForm, MessageForm, RoomForm
from chat.models import HISTORY, Room, lobby_cards


def rooms(request):
    """The front page: the rooms and who is in them, and a form for a new one."""
    form = RoomForm(request.POST or None)
    if form.is_valid():
        room = form.save()
        room.tell_lobby()
        return redirect(room)
    return render(request, "chat/rooms.html", {"cards": lobby_cards(), "form": form})


def room(request, slug):
    """A room. Everything in it comes through the socket: see events.py."""
    context = {
        "room": get_object_or_404(Room, slug=slug),
        "name_length": JoinForm.base_fields["name"].max_length,
        "text_length": MessageForm.base_fields["text"].max_length,
        "history": HISTORY,
        "countdown": bool(settings.CELERY_BROKER_URL),
    }
    return render(request, "chat/room.html", context)
