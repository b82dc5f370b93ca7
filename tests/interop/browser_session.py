"""People in rooms, each in a tab of a headless Chromium.

    python browser_session.py CHROMIUM URL TRANSPORTS COMPRESSION SCREENSHOT

A script of its own, as Playwright's event loop and gevent's patches do not share a process. It ends
with 0, or with the traceback of what did not happen.
"""

import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import CHROMIUM_ARGUMENTS


def main(chromium: str, url: str, transports: str, compression: str, screenshot: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        try:
            play(browser, url, transports, compression, screenshot)
        finally:
            browser.close()


def play(browser: Browser, url: str, transports: str, compression: str, screenshot: str) -> None:
    complaints: list[str] = []

    def enter(room: str) -> Page:
        page = browser.new_context().new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: line.type == "error" and complaints.append(line.text))
        page.goto(f"{url}/page/{room}/" + (f"?transports={transports}" if transports else ""))
        joined(page)
        return page

    anna, ben, carol = enter("tea"), enter("tea"), enter("coffee")

    # The defaults are the extension's: a WebSocket first.
    for page in (anna, ben, carol):
        assert transport(page) == (transports or "websocket")
        assert transports or extensions(page).partition(";")[0] == compression

    say(anna, "hello")
    hears(anna, "hello")
    hears(ben, "hello")
    say(ben, "<b>hello</b> – \u6f22\u5b57 \u2615")
    for page in (anna, ben):
        hears(page, "hello", "<b>hello</b> – \u6f22\u5b57 \u2615")

    ben.reload()
    joined(ben)
    say(anna, "welcome back")
    hears(ben, "welcome back")
    say(ben, "thanks")
    hears(anna, "hello", "<b>hello</b> – \u6f22\u5b57 \u2615", "welcome back", "thanks")
    hears(ben, "welcome back", "thanks")

    # The connection breaks; the page says nothing, the extension joins again.
    ben.evaluate("socket.io.engine.close()")
    ben.wait_for_function("document.body.dataset.state === 'disconnected'")
    joined(ben)
    say(anna, "still there?")
    hears(ben, "welcome back", "thanks", "still there?")

    # What the other room heard before its own message would stand before it.
    say(carol, "anybody?")
    hears(carol, "anybody?")

    anna.screenshot(path=screenshot)
    assert not complaints, complaints

    # Of the pages of other origins, only those that the project trusts. Chromium knows by itself
    # that all of localhost is this machine.
    for host, result in ("localhost", "connected"), ("untrusted.localhost", "refused"):
        stranger = browser.new_page()
        stranger.goto(f"{url.replace('127.0.0.1', host)}/page/tea/")
        assert stranger.evaluate(CONNECT, [url, transports]) == result


CONNECT = """([url, transports]) => new Promise((resolve) => {
    const options = transports ? { transports: [transports] } : {};
    const socket = new io.Socket(url, { ...options, reconnection: false });
    socket.on("connect", () => resolve("connected"));
    socket.on("connect_error", () => resolve("refused"));
})"""


def joined(page: Page) -> None:
    page.wait_for_function("document.body.dataset.state === 'joined'")


def say(page: Page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def hears(page: Page, *texts: str) -> None:
    """See that these, and no others, come to stand in the page, in this order."""
    expect(page.locator("#log li")).to_have_text(list(texts))


def transport(page: Page) -> str:
    return page.evaluate("socket.io.engine.transport.name")


def extensions(page: Page) -> str:
    return page.evaluate("socket.io.engine.transport.ws.extensions")


if __name__ == "__main__":
    main(*sys.argv[1:])
