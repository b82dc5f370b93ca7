from django.contrib import admin, messages
from django.shortcuts import redirect, render

from chat.forms import AnnouncementForm, RoomForm
from chat.models import Message, Presence, Room
from django_socketio import BackendError, NoSocket, broadcast_channel, disconnect, send


@admin.register(Room)
class RoomAdmin(admin.ModelAdmin):
    form = RoomForm
    list_display = ("name", "slug", "people_here", "created")
    search_fields = ("name",)
    actions = ("announce",)

    def get_queryset(self, request):
        return super().get_queryset(request).prefetch_related("presences")

    @admin.display(description="people here")
    def people_here(self, room):
        return len(room.people())

    @admin.action(
        description="Send a system message to the selected rooms",
        permissions=["change"],
    )
    def announce(self, request, queryset):
        """Ask for the text on a page of its own, then send it out of band."""
        form = AnnouncementForm(request.POST if "text" in request.POST else None)
        if not form.is_valid():
            context = {
                **self.admin_site.each_context(request),
                "title": "Send a system message",
                "opts": self.model._meta,
                "rooms": queryset,
                "form": form,
            }
            return render(request, "admin/chat/room/announce.html", context)
        for room in queryset:
            self._announce(request, room, form.cleaned_data["text"])
        return redirect(request.get_full_path())

    def _announce(self, request, room, text):
        kept = "It is in the history, for those who come later."
        try:
            room.announce(text)
        except NoSocket:
            self.message_user(request, f"Nobody is in “{room}”. {kept}", messages.WARNING)
        except BackendError as error:
            self.message_user(request, f"“{room}” did not hear it: {error} {kept}", messages.ERROR)
        else:
            self.message_user(request, f"“{room}” has heard it.", messages.SUCCESS)


@admin.register(Presence)
class PresenceAdmin(admin.ModelAdmin):
    list_display = ("name", "room", "joined", "session_id")
    list_filter = ("room",)
    actions = ("remove",)

    def has_add_permission(self, request):
        return False

    def has_change_permission(self, request, obj=None):
        return False

    @admin.action(
        description="Remove the selected people from their room",
        permissions=["delete"],
    )
    def remove(self, request, queryset):
        """Their handlers do the rest: the others see them leave."""
        for presence in queryset:
            try:
                send(presence.session_id, {"type": "removed"})
                disconnect(presence.session_id)
            except NoSocket:  # its worker was killed, and the sweeper has not been here yet
                presence.end(broadcast_channel)
        self.message_user(request, "They are out.", messages.SUCCESS)


@admin.register(Message)
class MessageAdmin(admin.ModelAdmin):
    list_display = ("created", "room", "name", "text")
    list_filter = ("room",)
    search_fields = ("name", "text")

    def has_add_permission(self, request):
        return False

    def has_change_permission(self, request, obj=None):
        return False
