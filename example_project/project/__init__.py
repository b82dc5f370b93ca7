import os

if os.environ.get("CELERY_BROKER_URL"):
    # Whoever delays a task takes this app for it. Without a broker nobody does, and Celery need not
    # even be installed.
    from project.celery import app as celery_app

    __all__ = ["celery_app"]
