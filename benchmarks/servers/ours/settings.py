"""A Django project with sessions and users; the message log is turned off."""

import os

SECRET_KEY = "benchmark"
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "urls"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django_socketio",
    "load",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
SOCKETIO_BACKEND = os.environ.get("BACKEND", "memory://")
SOCKETIO_MESSAGE_LOG_FORMAT = None
SOCKETIO_MAX_BUFFER = int(os.environ.get("MAX_BUFFER", 2**20))
