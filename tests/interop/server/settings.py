import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent

DEBUG = True
SECRET_KEY = "for the interop tests only"
ALLOWED_HOSTS = ["127.0.0.1", ".localhost"]
CSRF_TRUSTED_ORIGINS = os.environ.get("ROOMS_TRUSTED_ORIGINS", "").split()
ROOT_URLCONF = "urls"
USE_TZ = True
STATIC_URL = "/static/"

INSTALLED_APPS = [
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "django_socketio",
    "rooms",
]

MIDDLEWARE = [
    "django.middleware.common.CommonMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
]

# No database: what is tested here is the wire.
SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {"context_processors": ["django.template.context_processors.request"]},
    }
]

# Short enough that every longer test lives through some heartbeats, long enough for a busy machine.
SOCKETIO_PING_INTERVAL = 0.5
SOCKETIO_PING_TIMEOUT = 5

# Every message, so that whatever is tested is tested with that.
SOCKETIO_COMPRESSION = {"threshold": 0} if "ROOMS_COMPRESSION" in os.environ else None
