"""
What people may say, whichever way it arrives: by POST or through a socket.
"""

import unicodedata

from django import forms
from django.core.exceptions import ValidationError
from django.utils.text import slugify

from chat.models import Message, Presence, Room


def visible_line(value):
    """One line of characters that can be seen, so that no name imitates another."""
    value = " ".join(unicodedata.normalize("NFKC", value).split())
    if not value.isprintable():
        raise ValidationError("Please use visible characters only.")
    return value


class RoomForm(forms.ModelForm):
    class Meta:
        model = Room
        fields = ["name"]
        error_messages = {"name": {"required": "A room needs a name."}}

    def clean_name(self):
        name = visible_line(self.cleaned_data["name"])
        if self.instance.pk is None:  # a room that is renamed keeps its address
            self.instance.slug = self.free_slug(name)
        return name

    def free_slug(self, name):
        slug = slugify(name, allow_unicode=True)
        if not slug:
            raise ValidationError("The name needs at least one letter or digit.")
        if Room.objects.filter(slug=slug).exists():
            raise ValidationError("There is already a room of that name.")
        return slug


class JoinForm(forms.Form):
    name = forms.CharField(
        max_length=Presence._meta.get_field("name").max_length,
        error_messages={
            "required": "Please enter a name.",
            "max_length": "Please choose a name of at most %(limit_value)d characters.",
        },
    )

    def clean_name(self):
        return visible_line(self.cleaned_data["name"])


class MessageForm(forms.Form):
    text = forms.CharField(
        max_length=Message._meta.get_field("text").max_length,
        error_messages={
            "required": "The message is empty.",
            "max_length": "A message can have at most %(limit_value)d characters.",
        },
    )
    nonce = forms.UUIDField()


class HistoryForm(forms.Form):
    before = forms.IntegerField(min_value=1)


class CountdownForm(forms.Form):
    seconds = forms.IntegerField(
        min_value=1,
        max_value=60,
        error_messages={
            "required": "Please say how many seconds to count.",
            "invalid": "Please say how many seconds to count.",
            "min_value": "A countdown has at least %(limit_value)d second.",
            "max_value": "A countdown has at most %(limit_value)d seconds.",
        },
    )


class AnnouncementForm(forms.Form):
    text = forms.CharField(
        label="Message",
        max_length=Message._meta.get_field("text").max_length,
        widget=forms.Textarea(attrs={"rows": 4, "autofocus": True}),
    )
