"""
Run Autobahn cases against a server of WebSockets that echoes, and print their results as JSON.

    python tests/compliance/autobahn_client.py URL '1.*' 7.1.5 -12.2.9...

A case behind a dash is left out. A process of its own, as asyncio and gevent's patches do not share
one.
"""

import asyncio
import json
import os
import sys

import kosoku


async def run(url: str, *patterns: str) -> list[kosoku._kosoku.CaseResult]:
    cases = [pattern for pattern in patterns if pattern[0] != "-"]
    without = [pattern[1:] for pattern in patterns if pattern[0] == "-"]
    try:
        return await kosoku.run_fuzzingclient(url, cases, without, concurrency=2)
    except kosoku.FailureError as failure:
        return failure.results


if __name__ == "__main__":
    found = asyncio.run(run(*sys.argv[1:]))
    results = {case.case_id: [case.behavior.value, case.behavior_close.value] for case in found}
    print(json.dumps(results), flush=True)
    os._exit(0)  # the interpreter's end now and then meets a thread of kosoku's, and aborts
