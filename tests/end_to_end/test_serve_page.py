"""The web page, used in headless Chromium as a person would."""

import functools
import http.server
import shutil
import threading
import time

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
        page.fill("#labels", "")
        page.click("#rank")
        playwright.expect(page.locator("#rank-meta.error")).to_contain_text("label")
        page.fill("#labels", "1|2")
        page.click("#rank")
        playwright.expect(page.locator("#ranking tr")).to_have_count(3)
        values = [float(text) for text in page.locator("td.value").all_text_contents()]
        assert values == sorted(values, reverse=True)
        assert "<b>3</b>" in page.locator("td.what").all_text_contents()
        assert page.failures == []


def test_a_text_can_be_stopped(browser):
    with RunningServer() as server:
        page = open_slowly(browser, server)
        page.click("#send")
        playwright.expect(page.locator("#stop")).to_be_enabled()
        page.click("#stop")
        playwright.expect(page.locator("#reply-meta")).to_have_text("stopped")
        playwright.expect(page.locator("#send")).to_be_enabled()
        _wait_until_idle(page, server)


def _wait_until_idle(page, server):
    for _ in range(100):
        if server.service.generator.running == 0:
            return
        page.wait_for_timeout(100)
    pytest.fail("the engine still writes for nobody")


def test_a_key_is_asked_for(browser):
    with RunningServer(api_key="secret") as server:
        page = open_page(browser, server)
        playwright.expect(page.locator("#key")).to_be_visible()
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        playwright.expect(page.locator("#model")).to_contain_text("tiny-student")


def open_slowly(browser, server, **settings):
    """A page whose replies take long."""
    step = server.service.generator.step
    server.service.generator.step = lambda told: (time.sleep(0.1), step(told))[1]
    page = browser.new_page(**settings)
    page.set_default_timeout(20_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url.rpartition("/")[2]))
    page.goto(server.url)
    playwright.expect(page.locator("#model")).to_contain_text("tiny-student")
    page.fill("#prompt", "7a+4b*3c-8d+9" * 10)
    page.fill("#temperature", "2")
    page.fill("#tokens", "800")
    return page


def test_by_keyboard_alone_one_reply_at_a_time(browser):
    with RunningServer() as server:
        page = open_slowly(browser, server)
        page.focus("#prompt")
        for _ in range(4):
            page.keyboard.press("Control+Enter")
            page.wait_for_timeout(60)
        assert page.asked.count("completions") == 1
        page.keyboard.press("Escape")
        playwright.expect(page.locator("#reply-meta")).to_have_text("stopped")
        _wait_until_idle(page, server)
        del server.service.generator.step
        page.keyboard.press("Tab")  # to the first example
        assert page.evaluate("document.activeElement.parentElement.id") == "examples"
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#reply-meta")).to_contain_text("written")
        page.focus("#documents")
        page.keyboard.press("Control+Enter")
        playwright.expect(page.locator("#ranking tr")).to_have_count(3)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_in_sight_and_can_be_read(browser, width, scheme):
    with RunningServer() as server:
        viewport = {"width": width, "height": 800}
        page = browser.new_page(viewport=viewport, color_scheme=scheme)
        page.goto(server.url)
        playwright.expect(page.locator("#examples button")).to_have_count(3)
        page.locator("#examples button").first.click()
        playwright.expect(page.locator("#reply-meta")).to_contain_text("written")
        page.click("#rank")
        playwright.expect(page.locator("#ranking tr")).to_have_count(3)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        bars = page.locator(".track i").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
        assert bars == sorted(bars, reverse=True) and bars[0] > 0
        assert page.get_attribute("#answer", "aria-live") == "polite"
        assert page.get_attribute("#answer", "aria-busy") == "false"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 25, 27)"
        assert dark == (scheme == "dark")


def test_what_a_model_cannot_do_is_greyed_out_with_the_reason(browser):
    page = browser.new_page()
    model = {"id": "plain", "max_model_len": 9, "can_chat": False, "can_rank": False}
    model["examples"] = {"prompts": ["a"], "query": "q", "documents": ["d"], "labels": "x|y"}
    with RunningServer() as server:
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": [model]}))
        page.goto(server.url)
        playwright.expect(page.locator("#prompt-hint.reason")).to_contain_text("no chat template")
        assert page.is_disabled("#prompt") and page.is_disabled("#send")
        assert page.input_value("#labels") == "x|y" and page.is_enabled("#rank")


def test_pages_of_other_origins_neither_use_nor_read_the_server(browser, tmp_path):
    (tmp_path / "index.html").write_text("<p>elsewhere</p>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    elsewhere = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    blind = """async url => { await fetch(url, {method: "POST", mode: "no-cors",
        body: new Blob(['{"query": "12+3", "prompt": "1"}'])}).catch(() => null); }"""
    with RunningServer() as server:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{elsewhere.server_port}/")
        for path in ("/v1/prefill", "/v1/completions"):
            page.evaluate(blind, server.url + path)
        page.wait_for_timeout(300)
        assert not server.service.worker._pins and "generation_tokens_total" in server.service.metrics.text().decode()
        assert server.service.generator.running == 0 and server.service.scorer.cache_stats().queried_tokens == 0
        read = "async url => { try { return (await fetch(url)).status } catch { return 'refused' } }"
        assert page.evaluate(read, server.url + "/v1/models") == "refused"
    elsewhere.shutdown()
