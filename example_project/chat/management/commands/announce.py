from django.core.management.base import BaseCommand, CommandError

from chat.forms import AnnouncementForm
from chat.models import Room
from django_socketio import BackendError, NoSocket


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
        except (NoSocket, BackendError) as error:
            # With a backend that ends at this process, the rooms are empty here.
            raise CommandError(
                f"“{room}” did not hear it: {error}\n"
                "It is in the history, for those who come later."
            ) from None
        self.stdout.write(self.style.SUCCESS(f"“{room}” has heard it."))

    def find(self, slug):
        try:
            return Room.objects.get(slug=slug)
        except Room.DoesNotExist:
            slugs = ", ".join(Room.objects.values_list("slug", flat=True))
            raise CommandError(
                f"There is no room “{slug}”. There are: {slugs or 'none at all'}."
            ) from None
