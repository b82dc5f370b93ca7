"""
A process without sockets that makes the calls that come in as lines of JSON, and prints what they
return. Bytes are `{"base64": ...}`.
"""

import json
import os
import sys
from base64 import b64decode
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.deployment.settings"

import django  # noqa: E402

django.setup()

from tests.deployment.sender import attempt  # noqa: E402


def bytes_of(value):
    return b64decode(value["base64"]) if value.keys() == {"base64"} else value


for line in sys.stdin:
    print(json.dumps(attempt(*json.loads(line, object_hook=bytes_of))), flush=True)
