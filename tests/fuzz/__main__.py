"""
Look for bytes that a decoder has no answer to: `python -m tests.fuzz [--seconds N] [TARGET...]`.

It takes atheris, and begins with the corpus. What it finds on its way stays in `.fuzz/TARGET`, so
the next run goes on from there; bytes that break a target are in a file whose name it prints, and
belong into the corpus once that is mended.
"""

import argparse
import logging
import subprocess
import sys
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
FOUND = Path(".fuzz")


def fuzz(name: str, arguments: list[str]) -> None:
    """Be the process that fuzzes one target."""
    import atheris

    with atheris.instrument_imports(include=["django_socketio", "websockets"]):
        from tests.fuzz.targets import TARGETS

    logging.getLogger("django_socketio").setLevel(logging.CRITICAL)
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


def run(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own; tell whether nothing was found."""
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=4096"]
    options += ["-print_final_stats=1", "-verbosity=1", f"-artifact_prefix={found}/"]
    command = [sys.executable, "-m", "tests.fuzz", "--in-process", name, *options]
    return subprocess.run([*command, str(found), str(CORPUS / name)]).returncode == 0


def main() -> int:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description="Fuzz the decoders.")
    parser.add_argument("targets", nargs="*", metavar="target", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    options = parser.parse_args()
    failed = [name for name in options.targets or TARGETS if not run(name, options.seconds)]
    if failed:
        print(f"Broken: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-process"]:
        fuzz(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
