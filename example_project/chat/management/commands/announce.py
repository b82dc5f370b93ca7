from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from chat.forms import AnnouncementForm
from chat.models import Room
from django_socketio import BackendError, NoSocket

OTHER_PROCESS = (
    "The memory backend knows only the sockets of its own process, and this command "
    "is another one: announce from the admin instead, or let SOCKETIO_BACKEND name a "
    "backend that processes share."
)


class Command(BaseCommand):
    help = "Say something to everybody in a room, as the system."

    def add_arguments(self, parser):
        parser.add_argument("room", help="the slug of the room, as in its address")
        parser.add_argument("text")

    def handle(self, *, room, text, **options):
        room = self.find(room)
        form = AnnouncementForm({"text": text})
        if not form.is_valid():
            raise CommandError(form.errors["text"][0])
        try:
            room.announce(form.cleaned_data["text"])
        except NoSocket as error:
            raise CommandError(self.unheard(room, error)) from None
        except BackendError as error:
            raise CommandError(f"“{room}” did not hear it: {error}") from None
        self.stdout.write(self.style.SUCCESS(f"“{room}” has heard it."))

    def find(self, slug):
        try:
            return Room.objects.get(slug=slug)
        except Room.DoesNotExist:
            slugs = ", ".join(Room.objects.values_list("slug", flat=True))
            raise CommandError(
                f"There is no room “{slug}”. There are: {slugs or 'none at all'}."
            ) from None

    def unheard(self, room, error):
        lines = [f"Nobody in “{room}” heard it: {error}"]
        if str(settings.SOCKETIO_BACKEND).startswith("memory"):
            lines.append(OTHER_PROCESS)
        lines.append("The message is in the history, for those who come later.")
        return "\n".join(lines)
