from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("chat", "0002_first_rooms")]

    operations = [
        migrations.AddField(
            model_name="room",
            name="counting_until",
            field=models.DateTimeField(editable=False, null=True),
        ),
    ]
