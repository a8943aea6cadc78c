"""The web page, used in headless Chromium as a person would."""

import shutil

import pytest
from limbeck_server import RunningServer

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(browser, server):
    page = browser.new_page(viewport={"width": 1240, "height": 800})
    page.set_default_timeout(20_000)
    page.failures = []
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    page.on("request", lambda request: page.failures.append(request.url) if server.url not in request.url else None)
    page.goto(server.url)
    return page


def test_a_prompt_and_a_ranking(browser):
    with RunningServer() as server:
        page = open_page(browser, server)
        playwright.expect(page.locator("#model")).to_contain_text("tiny-student")
        page.fill("#prompt", "7a+4b*3c-8d+9")
        page.click("#send")
        playwright.expect(page.locator("#reply-meta")).to_contain_text("ended by the model")
        direct = server.post(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "7a+4b*3c-8d+9"}], "temperature": 0, "max_tokens": 400},
        ).json()["choices"][0]["message"]
        assert page.text_content("#thought") == direct["reasoning_content"]
        assert page.text_content("#answer") == direct["content"]
        page.fill("#query", "7a+4")
        page.fill("#documents", "1\n2\n\n<b>3</b>")
        page.click("#rank")
        playwright.expect(page.locator("#rank-meta.error")).to_contain_text("label")
        page.fill("#labels", "1|2")
        page.click("#rank")
        playwright.expect(page.locator("#ranking li")).to_have_count(3)
        values = [float(text) for text in page.locator(".value").all_text_contents()]
        assert values == sorted(values, reverse=True)
        assert "<b>3</b>" in page.locator(".what").all_text_contents()
        assert page.failures == []


def test_a_text_can_be_stopped(browser):
    with RunningServer() as server:
        page = open_page(browser, server)
        page.fill("#prompt", "7a+4b*3c-8d+9" * 10)
        page.fill("#temperature", "2")
        page.fill("#tokens", "800")
        page.evaluate("document.querySelector('#stop').disabled = false")
        page.click("#send")
        page.wait_for_function(
            "document.querySelector('#thought').textContent + document.querySelector('#answer').textContent"
        )
        page.click("#stop")
        playwright.expect(page.locator("#send")).to_be_enabled()
        assert page.text_content("#reply-meta") == "stopped" or "written" in page.text_content("#reply-meta")
        page.wait_for_timeout(300)
        assert server.service.generator.running == 0


def test_a_key_is_asked_for(browser):
    with RunningServer(api_key="secret") as server:
        page = open_page(browser, server)
        playwright.expect(page.locator("#key")).to_be_visible()
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        playwright.expect(page.locator("#model")).to_contain_text("tiny-student")
