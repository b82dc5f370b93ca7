from urllib.parse import unquote, urlsplit


def database(where):
    """Return the entry of DATABASES for an SQLite file's path or a PostgreSQL's URL."""
    url = urlsplit(str(where))
    if url.scheme not in ("postgres", "postgresql"):
        return sqlite(where)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": unquote(url.path.lstrip("/")),
        "USER": unquote(url.username or ""),
        "PASSWORD": unquote(url.password or ""),
        "HOST": url.hostname or "",
        "PORT": url.port or "",
    }


def sqlite(path):
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": path,
        "OPTIONS": {
            # Several processes may write: take the lock at the start of a
            # transaction and wait for it, and let readers go on meanwhile.
            "transaction_mode": "IMMEDIATE",
            "timeout": 10,
            "init_command": "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;",
        },
    }
