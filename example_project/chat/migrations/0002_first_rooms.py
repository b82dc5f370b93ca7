from django.db import migrations

NAMES = ("General", "Random")


def create(apps, schema_editor):
    room = apps.get_model("chat", "Room")
    for name in NAMES:
        room.objects.get_or_create(slug=name.lower(), defaults={"name": name})


class Migration(migrations.Migration):
    dependencies = [("chat", "0001_initial")]

    operations = [migrations.RunPython(create, migrations.RunPython.noop)]
