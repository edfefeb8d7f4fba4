"""The pages in a real browser: they work, look right in the dark and in the light, and talk to no one else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.browser import Chromium, Page, chromium
from tests.e2e.process import Server, serving
from tests.issuer import AUDIENCE, Issuer, issuing

KEY = "browser-key"
ASKED = "Tell me a long story about a dragon and a lighthouse."


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with issuing() as running:
        yield running


@pytest.fixture(scope="module")
def guarded(issuer: Issuer) -> Iterator[Server]:
    """A server with keys and an issuer, behind a prefix."""
    flags = ["--api-key", KEY, "--root-path", "/llm", "--max-model-len", "512"]
    flags += ["--oauth2-issuer", issuer.url, "--oauth2-audience", AUDIENCE, "--oauth2-scopes", "chat=infer,ops=admin"]
    flags += ["--oauth2-authorization-url", f"{issuer.url}/authorize", "--oauth2-token-url", f"{issuer.url}/token"]
    with serving(*flags) as running:
        yield running


def brightness(page: Page) -> float:
    """Of the page's background, as it is computed: 0 black, 255 white."""
    parts = page.value(
        "[document.body, document.documentElement].map((it) => getComputedStyle(it).backgroundColor)"
        ".find((it) => it !== 'rgba(0, 0, 0, 0)').match(/[0-9.]+/g).slice(0, 3).map(Number)"
    )
    return float(sum(parts)) / 3


def content_of(page: Page, server: Server, *others: str) -> None:
    """What must be so of every page: no error, no broken policy, no request to anyone else."""
    assert page.complaints == []
    assert page.origins() == {server.url, *others}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_home_page_chats_and_the_answer_grows(
    browser: Chromium, server: Server, dark: bool, tmp_path: Path
) -> None:
    with browser.page(server.url, dark=dark) as page:
        page.until("document.getElementById('state').dataset.state === 'ok'")
        page.until("document.getElementById('model').options.length && !document.getElementById('figures').hidden")
        page.value(
            "window.lengths = new Set(); new MutationObserver(() => lengths.add("
            "document.querySelector('.turn.assistant .answer')?.textContent.length))"
            ".observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true}), 0"
        )
        page.type("#words", ASKED)
        page.press("Enter", 13)
        page.until("document.querySelector('.turn.assistant.growing')")
        assert page.value("document.getElementById('send').disabled && !document.getElementById('stop').disabled")
        page.until("document.querySelector('.turn.assistant .answer')?.textContent.length > 20")
        page.click("#stop")
        page.until("!document.querySelector('.growing') && !document.getElementById('send').disabled")
        assert page.value("lengths.size") >= 3
        assert page.value("document.querySelector('.turn.user .answer').textContent") == ASKED
        assert page.value("document.activeElement.id") == "words"
        assert (brightness(page) < 60) == dark
        page.picture(tmp_path / "home.png")
        page.click("#clear")
        page.until("!document.querySelector('.turn') && !document.getElementById('empty').hidden")
        content_of(page, server)


def test_the_home_page_of_a_guarded_server_asks_for_a_key_and_forgets_it(browser: Chromium, guarded: Server) -> None:
    with browser.page(f"{guarded.url}/llm/") as page:
        page.until("document.getElementById('state').dataset.state === 'ok'")
        page.until("!document.getElementById('key-form').hidden")
        assert page.value("document.getElementById('model').options.length") == 0
        page.type("#key", KEY)
        page.press("Enter", 13)
        page.until("document.getElementById('model').options.length === 1")
        page.type("#words", "Hi")
        page.click("#send")
        page.until("document.querySelector('.turn.assistant .answer')?.textContent")
        page.click("#stop")
        page.until("!document.querySelector('.growing')")
        assert page.value("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        content_of(page, guarded)
        assert not [url for url in page.requests if "/llm/" not in url]


def test_an_answer_that_is_refused_is_said_in_the_conversation(browser: Chromium, server: Server) -> None:
    with browser.page(server.url, size=(420, 800)) as page:
        page.until("document.getElementById('model').options.length")
        page.type("#words", "long " * 20_000)
        page.click("#send")
        page.until("document.querySelector('.turn.error .answer')?.textContent.includes('tokens')")
        page.until("!document.getElementById('send').disabled")
        assert page.value("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out of a small screen
        (complaint,) = page.complaints  # the browser's own word on a reply of 400
        assert "400" in complaint


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_swagger_ui_tries_a_streamed_chat(browser: Chromium, server: Server, dark: bool, tmp_path: Path) -> None:
    with browser.page(f"{server.url}/docs", dark=dark) as page:
        chat = "#operations-Inference-chat"
        page.click(f"{chat} .opblock-summary-control")
        example = page.until(f"document.querySelector('{chat} textarea')?.value")
        asked = {**json.loads(str(example)), "stream": True, "max_tokens": 8}
        page.type(f"{chat} textarea", json.dumps(asked))
        page.click(f"{chat} .execute")
        text = str(page.until(f"document.querySelector('{chat} .live-responses-table pre.microlight')?.textContent"))
        assert "chat.completion.chunk" in text
        assert "data: [DONE]" in text
        assert (
            page.value(
                f"document.querySelector('{chat} .live-responses-table .response .response-col_status').innerText"
            )
            == "200"
        )
        assert (brightness(page) < 60) == dark
        page.picture(tmp_path / "docs.png")
        content_of(page, server)


def test_swagger_ui_authorises_with_a_key(browser: Chromium, guarded: Server) -> None:
    with browser.page(f"{guarded.url}/llm/docs") as page:
        page.click(".btn.authorize")
        page.type("#auth-bearer-value", KEY)
        page.click(".auth-container:has(#auth-bearer-value) .btn.authorize")
        page.until("document.querySelector('.auth-container .btn.modal-btn')?.innerText === 'Logout'")
        page.click(".btn-done")
        tries_models(page)
        content_of(page, guarded)


def test_swagger_ui_authorises_with_the_issuer(
    browser: Chromium, guarded: Server, issuer: Issuer, tmp_path: Path
) -> None:
    with browser.page(f"{guarded.url}/llm/docs", dark=True) as page:
        page.click(".btn.authorize")
        page.type("#client_id_authorizationCode", "swagger")
        page.click("label[for^=chat-authorizationCode]")
        page.picture(tmp_path / "authorise.png")
        page.click(".auth-container:has(#client_id_authorizationCode) .btn.authorize")
        page.until("[...document.querySelectorAll('.auth-container .btn')].some((it) => it.innerText === 'Logout')")
        (granted,) = issuer.granted
        assert granted["redirect_uri"] == f"{guarded.url}/llm/docs/oauth2-redirect"
        assert granted["scope"] == "chat"
        page.click(".btn-done")
        tries_models(page)
        content_of(page, guarded, issuer.url)


def tries_models(page: Page) -> None:
    """Execute GET /v1/models; it is let in."""
    page.click("#operations-Inference-models .opblock-summary-control")
    page.click("#operations-Inference-models .execute")
    assert status(page, "#operations-Inference-models") == "200"


def status(page: Page, operation: str) -> str:
    """That of the reply to what was tried, once it is there."""
    text = page.until(
        f"document.querySelector('{operation} .live-responses-table .response .response-col_status')?.innerText"
    )
    return str(text).split()[0]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_redoc_draws_every_route_and_finds_words(browser: Chromium, server: Server, dark: bool, tmp_path: Path) -> None:
    with browser.page(f"{server.url}/redoc", dark=dark) as page:
        page.until("document.querySelector('[data-section-id$=\"/operation/chat\"]')")
        assert page.value("document.querySelectorAll('[data-section-id*=\"/operation/\"]').length") > 30
        page.type("input[type=text]", "rerank")
        page.until(
            "document.querySelector('[data-role=\"search:results\"]')?.innerText.toLowerCase().includes('rerank')"
        )
        assert (brightness(page) < 60) == dark
        page.picture(tmp_path / "redoc.png")
        content_of(page, server)


def test_the_redirect_page_opened_by_hand_says_what_it_is_for(browser: Chromium, server: Server) -> None:
    with browser.page(f"{server.url}/docs/oauth2-redirect?code=stolen&state=x") as page:
        page.until("document.getElementById('said').textContent.includes('there is none')")
        content_of(page, server)
