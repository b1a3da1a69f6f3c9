"""The page in a browser: ask, see, follow a row to its neighbours; and texts that would like to be markup."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from influence_fast.serving.lookup import Lookup

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def visit(lookup: Lookup, serving: Callable[..., Any]) -> Iterator[Any]:
    """Opens the page; nothing may fail in it, and nothing may be loaded from elsewhere."""
    wrong: list[str] = []
    with serving(lookup) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        context = browser.new_context()
        context.set_default_timeout(15000)
        playwright.expect.set_options(timeout=15_000)

        def go(path: str = "/", width: int = 1280) -> Any:
            page = context.new_page()
            page.set_viewport_size({"width": width, "height": 800})
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda message: wrong.append(message.text))
            page.on("request", lambda r: r.url.startswith(f"http://{address}/") or wrong.append(r.url))
            page.goto(f"http://{address}{path}")
            return page

        yield go
        browser.close()
    # A refused question is logged by the browser itself.
    assert [text for text in wrong if "422" not in text and "favicon" not in text and "404" not in text] == []


def ready(page: Any) -> None:
    page.wait_for_selector("#method option", state="attached")


def answered(page: Any) -> None:
    page.wait_for_selector("#helpful li")


def test_a_question_is_answered_with_rows_shares_and_tokens(visit: Any) -> None:
    page = visit()
    ready(page)
    page.fill("#text", "w1 w2 <b>w3</b>")
    page.select_option("#class", "2")
    page.select_option("#method", "trackstar")
    page.fill("#k", "3")
    page.click("#ask")
    answered(page)
    assert page.locator("#helpful li").count() == page.locator("#harmful li").count() == 3
    assert page.locator("#asked").inner_text() == "w1 w2 <b>w3</b> [2]"
    first = page.locator("#helpful li").first
    assert "helpful, influence" in first.inner_text()
    assert "head" in first.locator(".shares").inner_text()
    page.wait_for_selector("#tokens .token")
    assert page.locator("#tokens .token").first.inner_text() == "w1"
    first.get_by_role("button", name="tokens it explains").click()
    playwright.expect(page.locator("#tokens-note")).to_contain_text("Influence of row")
    assert "trackstar, exact" in page.locator("#status").inner_text()


def test_neighbours_of_a_row_are_a_link_away(visit: Any) -> None:
    page = visit("/#row=" + "row%2F7")
    answered(page)
    text = page.locator("#asked").inner_text()
    link = page.locator("#helpful li a").nth(1)
    name = page.locator("#helpful li").nth(1).get_attribute("data-id")
    link.click()
    playwright.expect(page.locator("#asked")).not_to_have_text(text)
    assert name in page.evaluate("decodeURIComponent(location.hash)")
    page.go_back()
    playwright.expect(page.locator("#asked")).to_have_text(text)


def test_texts_and_names_are_never_markup(visit: Any) -> None:
    page = visit()
    ready(page)
    page.fill("#k", "20")
    page.select_option("#query", "1")
    answered(page)
    assert "<script>window.ran = 1</script>" in page.locator("#asked").inner_text()
    texts = page.locator("#helpful .text").all_inner_texts()
    assert any("<script>window.ran" in text for text in texts)
    assert any('"><img src=x' in text for text in texts)
    assert page.evaluate("window.ran") is None
    assert page.locator("main img, main b, #helpful script").count() == 0
    # A name with every special character leads to its row.
    page.locator("#helpful li", has_text="row <i>1</i>&row=1").locator("a").click()
    playwright.expect(page.locator("#asked")).to_contain_text('"><img')
    assert page.evaluate("window.ran") is None


def test_what_is_wrong_is_said_and_a_phone_is_wide_enough(visit: Any) -> None:
    page = visit("/#row=nobody", 360)
    page.wait_for_selector("#status.error")
    assert "no row has the id 'nobody'" in page.locator("#status").inner_text()
    page.evaluate("location.hash = 'row=' + encodeURIComponent('row/7')")
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert visit("/docs").locator("h2").count() == 4
