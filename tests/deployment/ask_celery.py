"""Has a Celery worker make the calls that come in as lines of JSON, and prints what they return."""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from tests.deployment.tasks import attempt  # noqa: E402

for line in sys.stdin:
    print(json.dumps(attempt.delay(*json.loads(line)).get(timeout=60)), flush=True)
