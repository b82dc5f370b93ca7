"""Bring the official Socket.IO client for browsers into the package, or check what is there.

    python tools/refresh_client.py [VERSION]    fetch it with npm, by default the newest 4.x
    python tools/refresh_client.py --check      compare the files with their record, offline

The files are upstream's, byte for byte, the source map included: Django's
ManifestStaticFilesStorage follows the sourceMappingURL at the end of the script and fails where the
map is missing. The record beside them names the version and the checksums. The interop tests get
the same version of the client.
"""

import argparse
import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "socket.io-client"
ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "django_socketio" / "static" / "django_socketio"
RECORD = TARGET / "socket.io.json"
INTEROP = ROOT / "tests" / "interop"

# Each with where upstream's package has it.
FILES = {
    "socket.io.min.js": "dist/socket.io.min.js",
    "socket.io.min.js.map": "dist/socket.io.min.js.map",
    "socket.io.LICENSE": "LICENSE",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "version", nargs="?", default="4", help="an exact version or a range that npm understands"
    )
    parser.add_argument("--check", action="store_true", help="compare the files with their record")
    options = parser.parse_args(argv)
    try:
        record = check() if options.check else refresh(options.version)
    except RefreshError as error:
        print(f"refresh_client: {error}", file=sys.stderr)
        return 1
    print(f"{PACKAGE} {record['version']}: {', '.join(FILES)} in order")
    return 0


class RefreshError(Exception):
    """What was fetched, or what is there, is not what it should be."""


def refresh(wanted: str) -> dict:
    """Fetch, verify, and only then write."""
    with tempfile.TemporaryDirectory() as directory:
        packed = pack(f"{PACKAGE}@{wanted}", Path(directory))
        archive = Path(directory, packed["filename"])
        verify_integrity(archive.read_bytes(), packed["integrity"])
        contents = extract(archive)
    verify_contents(contents, packed["version"])
    record = {
        "package": PACKAGE,
        "version": packed["version"],
        "license": "MIT",
        "integrity": packed["integrity"],
        "note": "Upstream's files, unchanged; written by tools/refresh_client.py.",
        "files": {
            name: {"from": source, "sha256": sha256(contents[name])}
            for name, source in FILES.items()
        },
    }
    for name, content in contents.items():
        (TARGET / name).write_bytes(content)
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    pin(record["version"])
    return record


def check() -> dict:
    """Compare the files with their record; return the record."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for name in FILES:
        if sha256((TARGET / name).read_bytes()) != record["files"][name]["sha256"]:
            raise RefreshError(f"{name} is not the one in {RECORD.name}; fetch it again")
    return record


def pack(specifier: str, directory: Path) -> dict:
    """Have npm download the package's archive; return what npm says of it."""
    packed = json.loads(npm("pack", specifier, "--json", cwd=directory))
    if len(packed) != 1:
        raise RefreshError(f"{specifier} names {len(packed)} versions; give one")
    return packed[0]


def pin(version: str) -> None:
    """Have the interop tests use the version; their .npmrc keeps the lock free of addresses."""
    npm("install", "--package-lock-only", "--save-exact", f"{PACKAGE}@{version}", cwd=INTEROP)


def npm(*arguments: str, cwd: Path) -> str:
    command = ["npm", *arguments, "--silent"]
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RefreshError("npm is not on PATH; install Node.js to refresh the client") from None
    if done.returncode:
        raise RefreshError(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
    return done.stdout


def verify_integrity(archive: bytes, integrity: str) -> None:
    """Hold the archive against the registry's word on it, `algorithm-base64`."""
    algorithm, _, expected = integrity.partition("-")
    if base64.b64encode(hashlib.new(algorithm, archive).digest()).decode() != expected:
        raise RefreshError("the archive does not match its integrity")


def extract(path: Path) -> dict[str, bytes]:
    """Read the wanted files, and no other, out of the archive."""
    contents = {}
    with tarfile.open(path) as archive:
        for name, source in FILES.items():
            try:
                member = archive.extractfile(f"package/{source}")
            except KeyError:
                member = None
            if member is None:
                raise RefreshError(f"the package holds no {source}")
            contents[name] = member.read()
    return contents


def verify_contents(contents: dict[str, bytes], version: str) -> None:
    """See that the script is the version's own build, has its map, and is still under MIT."""
    script = contents["socket.io.min.js"]
    if f"Socket.IO v{version}\n".encode() not in script[:200]:
        raise RefreshError(f"the script's banner does not say v{version}")
    if not script.rstrip().endswith(b"//# sourceMappingURL=socket.io.min.js.map"):
        raise RefreshError("the script does not end with the name of its source map")
    if b"MIT" not in contents["socket.io.LICENSE"]:
        raise RefreshError("the licence is no longer MIT")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
