"""Run by a Celery worker: celery -A tests.deployment.tasks worker."""

import os

os.environ["DJANGO_SETTINGS_MODULE"] = "tests.deployment.settings"

import django
from celery import Celery

django.setup()

from tests.deployment import sender  # noqa: E402

broker = os.environ["CELERY_BROKER_URL"]
app = Celery("deployment", broker=broker, backend=broker)


@app.task
def attempt(name, *args):
    return sender.attempt(name, *args)
