"""This project as a site runs it: manage.py runserver_socketio 127.0.0.1:PORT --noreload"""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
    execute_from_command_line(sys.argv)
