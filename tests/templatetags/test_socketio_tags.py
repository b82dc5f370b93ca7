"""`{% socketio %}`: what a page gets."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from django.contrib.staticfiles import finders
from django.template import Context, Template
from django.test import override_settings
from django.urls import include, path

from tests import clients
from tests.sites import Site

urlpatterns = [path('realtime/"quoted"/', include("django_socketio.urls"))]
nothing: list[Any] = []


class Scripts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag == "script"
        self.scripts.append(dict(attrs))


def scripts() -> list[dict[str, str | None]]:
    html = Template("{% load socketio_tags %}{% socketio %}").render(Context())
    parser = Scripts()
    parser.feed(html)
    assert not re.sub(r"(?s)<script[^>]*></script>", "", html).strip()  # nothing inline, for CSPs
    return parser.scripts


def test_it_loads_the_official_client_and_then_the_extension() -> None:
    client, extension = scripts()
    assert client["src"] == "/static/django_socketio/socket.io.min.js"
    assert extension["src"] == "/static/django_socketio/socketio.js"
    assert extension["data-path"] == "/socket.io/"
    for name in ("socket.io.min.js", "socketio.js"):
        assert finders.find(f"django_socketio/{name}")


def test_the_path_is_the_url_confs(site: Site) -> None:
    with override_settings(ROOT_URLCONF=__name__):
        assert scripts()[1]["data-path"] == "/realtime/%22quoted%22/socket.io/"
    data_path = scripts()[1]["data-path"]
    assert site.connect(path=data_path).fence() == []


def test_a_process_without_the_url_conf_names_the_usual_path() -> None:
    class Empty:
        urlpatterns: list[Any] = []

    with override_settings(ROOT_URLCONF=Empty):
        assert scripts()[1]["data-path"] == "/socket.io/" == clients.PATH


@pytest.mark.parametrize("static", ["/assets/", "https://cdn.example.com/s/"])
def test_static_files_may_be_anywhere(static: str) -> None:
    with override_settings(STATIC_URL=static):
        assert [script["src"] for script in scripts()] == [
            f"{static}django_socketio/socket.io.min.js",
            f"{static}django_socketio/socketio.js",
        ]
