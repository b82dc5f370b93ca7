"""DEPLOYMENT holds, as JSON, the settings that a test sets."""

import json
import os

SECRET_KEY = "only for the tests"
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "tests.deployment.urls"
INSTALLED_APPS = ["django_socketio", "tests.deployment"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
SOCKETIO_MESSAGE_LOG_FORMAT = None
WSGI_APPLICATION = "tests.deployment.wsgi.application"

globals().update(json.loads(os.environ.get("DEPLOYMENT", "{}")))
