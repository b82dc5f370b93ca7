"""Our codec and the parser inside the official client say the same about random packets."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from django_socketio.protocol import socketio
from django_socketio.protocol.exceptions import ProtocolError
from django_socketio.protocol.socketio import Assembly, Limits, Packet, PacketType
from tests.protocol import packets

HERE = Path(__file__).resolve().parent
BYTES = "bytes, in hex"
MAX_ATTACHMENTS = 100
LIMITS = Limits(attachments=MAX_ATTACHMENTS)


class Refused(Exception):
    """The official parser raised an error."""


class Parser:
    """A Node process that encodes and decodes one packet after the other."""

    def __init__(self, node: str) -> None:
        self.process = subprocess.Popen(
            [node, "parser.mjs", str(MAX_ATTACHMENTS)],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def encode(self, packet: Packet) -> list[str | bytes]:
        type_, namespace, data, id_ = packet
        fields = {"type": type_, "nsp": namespace, "data": data, "id": id_}
        # To JavaScript, what is undefined is not null.
        given = {name: value for name, value in fields.items() if value is not None}
        messages: list[str | bytes] = self._ask({"encode": given})
        return messages

    def decode(self, messages: list[str | bytes]) -> Packet:
        fields = self._ask({"decode": messages})
        type_ = PacketType(fields["type"])
        return Packet(type_, fields["nsp"], fields.get("data"), fields.get("id"))

    def _ask(self, question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question, default=_tag).encode() + b"\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline(), object_hook=_untag)
        if isinstance(answer, dict) and "error" in answer:
            raise Refused(answer["error"])
        return answer


def _tag(data: bytes) -> dict[str, str]:
    return {BYTES: data.hex()}


def _untag(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value[BYTES]) if BYTES in value else value


@pytest.fixture(scope="module")
def parser(node: str, client: None) -> Iterator[Parser]:
    parser = Parser(node)
    with parser.process:
        yield parser


def decode(messages: list[str | bytes]) -> Packet:
    text, *attachments = messages
    assert isinstance(text, str)
    decoded: Packet | Assembly | None = socketio.decode(text, LIMITS)
    for attachment in attachments:
        assert isinstance(decoded, Assembly) and isinstance(attachment, bytes)
        decoded = decoded.add(attachment) or decoded
    assert isinstance(decoded, Packet)
    return decoded


@given(packet=packets.packets)
def test_it_reads_what_we_write(parser: Parser, packet: Packet) -> None:
    text, attachments = socketio.encode(packet)
    assert parser.decode([text.decode(), *attachments]) == packet


@given(packet=packets.packets)
def test_we_read_what_it_writes(parser: Parser, packet: Packet) -> None:
    assert decode(parser.encode(packet)) == packet


# Few of them are packets. "null" for no payload is the one thing that we take and it does not.
@settings(max_examples=1000)
@given(text=packets.nearly.filter(lambda text: "null" not in text), attachment=st.binary())
def test_it_reads_whatever_we_read(parser: Parser, text: str, attachment: bytes) -> None:
    """Two parsers that disagree about a packet are what attacks begin with."""
    messages: list[str | bytes] = [text]
    try:
        decoded: Packet | Assembly | None = socketio.decode(text, LIMITS)
    except ProtocolError:
        return
    while isinstance(decoded, Assembly):
        messages.append(attachment)
        decoded = decoded.add(attachment) or decoded
    assert parser.decode(messages) == decoded


@pytest.mark.parametrize(
    "text",
    [
        "7",
        '2{"a":1}',
        "2[]",
        "2[null]",
        '2["connect"]',
        '2[{"toString":"foo"}]',
        '212{"a":1}',
        "1[]",
        "0[]",
        "4[]",
        "312{}",
        '51["a"]',
        '5-1-["a"]',
        '5101-["a"]',
        "51.5-[]",
    ],
)
def test_we_refuse_what_it_refuses(parser: Parser, text: str) -> None:
    with pytest.raises(Refused):
        parser.decode([text])
    with pytest.raises(ProtocolError):
        socketio.decode(text, LIMITS)
