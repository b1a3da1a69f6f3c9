"""The report in a browser: find, open, decide by button and by key, keep, export, clean; and whom it may not shut out."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from audit_results import audit_result, with_findings
from audits import options, run, write_rows

from influence_fast.auditing.report import page as report_page
from influence_fast.auditing.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")

HOSTILE = [
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 2</script>",
    '"><img src=x onerror="window.ran = 3">',
    "<!--<script>",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd",
    "=HYPERLINK(1)",
]
IDS = ["__proto__", "constructor", "=1+1", '"><img src=x onerror="window.ran = 4">', "a,b\nc", "-3"]


@pytest.fixture(scope="module")
def profile() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        context = browser.new_context()
        context.set_default_timeout(5000)
        yield context
        browser.close()


@pytest.fixture
def visit(profile: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; no script of it may fail, and nothing may be loaded or refused. Decisions are forgotten afterwards."""
    pages, wrong = [], []

    def go(path: Path, width: int = 1280, scheme: str = "light", script: str = "") -> Any:
        page = profile.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        if script:
            page.add_init_script(script)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: request.url.startswith(("file:", "blob:")) or wrong.append(request.url))
        page.goto(path.as_uri())
        return page

    yield go
    pages[0].evaluate("localStorage.clear()")
    for page in pages:
        page.close(run_before_unload=False)
    assert wrong == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples with everything that is known of a sample."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    texts = ["dull and good", "bright film", "very good", "stale", "a score", "last " * 40]
    labels = ["pos", "neg", "pos", "neg", "pos", "neg"]
    estimate = {
        "estimate": 2.4,
        "low": 1,
        "high": 4,
        "share": 0.4,
        "calibrated_on": "9 trusted rows",
        "method": "isotonic",
    }
    bins = [{"predicted": 0.1, "observed": 0.2, "count": 5}, {"predicted": 0.9, "observed": 0.8, "count": 7}]
    write_report(path, with_findings(audit_result(texts, labels, wrong_labels=estimate, reliability=bins)))
    return path


def ids(page: Any) -> list[str]:
    return (
        page.locator(".sample .about .id bdi").all_inner_texts()
        if page.locator(".evidence:visible").count() == 0
        else []
    )


def item(page: Any, number: int) -> Any:
    return page.locator(".sample").nth(number)


def exported(page: Any, path: Path) -> list[list[str]]:
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(path)
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file, strict=True))


def test_samples_are_found_by_search_filters_and_order(report: Path, visit: Callable[..., Any]) -> None:
    page = visit(report)
    assert ids(page) == list("012345")
    page.fill("#search", "GOOD very")
    assert ids(page) == ["2"]
    assert page.inner_text("#count") == "1 sample of 6 match"
    page.fill("#search", "nowhere")
    assert page.inner_text("#count") == "No sample matches these filters."
    page.click("#clear")
    page.select_option("#by-label", label="pos")
    assert ids(page) == list("024")
    page.select_option("#by-kind", label="unremarkable")
    assert ids(page) == list("24")
    page.click("#clear")
    page.fill("#least", "60")
    assert ids(page) == list("012")
    page.click("#clear")
    page.select_option("#order", label="Highest loss first")
    assert ids(page) == list("543210")
    page.select_option("#order", label="Longest text first")
    assert ids(page)[:2] == ["5", "0"]
    item(page, 1).get_by_role("button", name="Drop").click()
    page.select_option("#by-decision", label="drop")
    assert ids(page) == ["0"]


def test_a_sample_opens_to_its_evidence(report: Path, visit: Callable[..., Any]) -> None:
    page = visit(report)
    item(page, 1).get_by_role("button", name="Evidence on sample 1").click()
    seen = item(page, 1).locator(".evidence").inner_text()
    for part in (
        "Reason 1.",
        "similarity 0.75",
        "last last",
        "Queries that it hurts most",
        "q1",
        "influence \u22120.5",
    ):
        assert part in seen
    assert "The same or nearly the same" in seen
    assert item(page, 1).locator(".token.harms").first.inner_text() == "very"
    # The tokens are the text of the third alone.
    assert item(page, 1).locator(".full").all_inner_texts() == ["bright film", "very good"]
    item(page, 2).get_by_role("button", name="Evidence").click()
    assert item(page, 2).locator(".full").all_inner_texts() == ["very good"]
    assert "about 2 of 6 labels are wrong, 1 to 4" in page.locator("#trust").text_content().lower()
    page.click("#tab-trust")
    assert page.locator("#trust svg").is_visible()
    assert "How far the probability" in page.inner_text("#trust")


def test_decisions_by_button_are_kept_undone_exported_and_imported(
    report: Path, visit: Callable[..., Any], tmp_path: Path
) -> None:
    page = visit(report)
    item(page, 0).get_by_role("button", name="Relabel").click()
    item(page, 2).get_by_role("button", name="Drop").click()
    item(page, 3).get_by_role("button", name="Keep").click()
    item(page, 3).get_by_role("button", name="Evidence").click()
    item(page, 3).get_by_label("Note").fill('rare, "but" right')
    item(page, 3).get_by_label("Note").press("Tab")
    assert page.inner_text("#decided") == "3 of 6 decided"
    # Another window on the same audit follows.
    window = visit(report)
    assert window.inner_text("#decided") == "3 of 6 decided"
    item(window, 4).get_by_role("button", name="Drop").click()
    playwright.expect(page.locator("#decided")).to_have_text("4 of 6 decided")
    item(window, 4).get_by_role("button", name="Drop").click()
    window.close()
    page.reload()
    assert page.inner_text("#decided") == "3 of 6 decided"
    assert item(page, 0).locator(".becomes").inner_text() == "becomes neg"
    lines = exported(page, tmp_path / "review.csv")
    decided = [["0", "relabel", "neg", ""], ["2", "drop", "", ""], ["3", "keep", "", 'rare, "but" right']]
    assert lines == [["id", "decision", "label", "why"], *decided]
    page.locator("#bulk").get_by_role("button", name="Drop").click()
    assert page.inner_text("#decided") == "6 of 6 decided"
    page.click("#undo")
    assert page.inner_text("#decided") == "3 of 6 decided"
    assert exported(page, tmp_path / "again.csv") == lines
    page.evaluate("localStorage.clear()")
    other = visit(report)
    assert other.inner_text("#decided") == "0 of 6 decided"
    text = (tmp_path / "review.csv").read_text() + "77,drop,,\n4,burn,,\n5,relabel,odd,\n"
    (tmp_path / "edited.csv").write_text("\ufeff" + text, encoding="utf-8")
    other.set_input_files("#file", tmp_path / "edited.csv")
    playwright.expect(other.locator("#decided")).to_have_text("3 of 6 decided, and 1 not on this page")
    said = other.inner_text("#said")
    assert "row 5: expected keep, relabel, drop, got burn" in said
    assert "row 6: no sample has the label odd" in said
    assert exported(other, tmp_path / "third.csv") == [*lines, ["77", "drop", "", ""]]
    other.click("#undo")
    assert other.inner_text("#decided") == "0 of 6 decided"


def test_a_keyboard_is_enough(report: Path, visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(report)
    for key in ("j", "1", "3", "2", "k", "Enter", "j", "j", "3", "u"):
        page.keyboard.press(key)
    assert [item(page, i).get_attribute("data-decision") for i in range(5)] == ["keep", "drop", "relabel", "", ""]
    assert item(page, 2).locator(".evidence").is_visible()
    page.keyboard.press("k")
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.querySelector('.id bdi').textContent") == "2"
    page.keyboard.press("0")
    assert item(page, 2).get_attribute("data-decision") == ""
    page.keyboard.press("/")
    page.keyboard.type("stale 1")
    assert page.input_value("#search") == "stale 1"
    assert page.inner_text("#decided") == "2 of 6 decided"
    page.keyboard.press("Control+A")
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("3")
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    assert page.inner_text("#decided") == "2 of 6 decided"
    page.keyboard.press("?")
    page.uncheck("#keys-on")
    page.keyboard.press("Escape")
    page.keyboard.press("3")
    assert page.inner_text("#decided") == "2 of 6 decided"
    # Everything is reached with Tab, and what has the focus shows it.
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, width = page.evaluate(
            """() => { const at = document.activeElement, style = getComputedStyle(at);
            return [at.id || at.className, at === document.body ? 1 : parseFloat(style.outlineWidth)]; }"""
        )
        reached.add(name)
        assert width > 0, name
    assert {"tab-review", "search", "order", "least", "clear", "export", "open", "keep", "drop"} <= reached
    page.focus("#tab-review")
    page.keyboard.press("ArrowRight")
    assert page.locator("#trust").is_visible()
    page.keyboard.press("3")
    assert "2 of 6 decided" in page.locator("#decided").text_content()


def test_a_browser_that_keeps_nothing_says_so(report: Path, visit: Callable[..., Any], tmp_path: Path) -> None:
    forgetful = "Storage.prototype.getItem = () => '{broken';"
    page = visit(report, script=forgetful)
    assert page.inner_text("#decided") == "0 of 6 decided"
    assert not page.locator("#unkept").is_visible()
    refuse = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
    gone = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    for script in (refuse, gone):
        page = visit(report, script=script)
        item(page, 0).get_by_role("button", name="Drop").click()
        assert "keeps nothing" in page.inner_text("#unkept")
        assert exported(page, tmp_path / "review.csv")[1:] == [["0", "drop", "", ""]]


@pytest.fixture(scope="module")
def hostile(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real audit of texts and ids that try to become markup, formulas or properties."""
    place = tmp_path_factory.mktemp("hostile")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["id"] = IDS[i] if i < len(IDS) else f"r{i}"
        row["text"] += f" {HOSTILE[i % len(HOSTILE)]}"
    data = write_rows(place / "train.jsonl", rows)
    given = options(folder, train=data, methods="cosine", layers="head")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "plots", lambda *_: [])
        code, _, err = run("audit", *given, "--out", place / "audit")
    assert code == 0, err
    return place / "audit"


def test_texts_are_never_run_and_clean_takes_the_export(
    hostile: Path, visit: Callable[..., Any], tmp_path: Path
) -> None:
    page = visit(hostile / "report.html")
    assert set(IDS) <= {name.replace("\r\n", "\n") for name in page.locator(".about .id bdi").all_text_contents()}
    for button in page.locator(".open").all()[:8]:
        button.click()
    shown = "\n".join(page.locator(".full").all_text_contents())
    assert "<script>window.ran = 1</script>" in shown or "onerror" in shown
    for number in range(page.locator(".sample").count()):
        name = item(page, number).locator(".about .id bdi").first.text_content()
        if name in IDS:
            action = ("Drop", "Keep", "Relabel")[IDS.index(name) % 3]
            item(page, number).get_by_role("button", name=action).click()
            if action == "Relabel" and item(page, number).get_attribute("data-decision") == "":
                item(page, number).locator(".new-label").select_option(index=1)
    assert page.evaluate("[window.ran, document.images.length, document.scripts.length]") == [None, 0, 2]
    assert page.inner_text("#decided") == "6 of 20 decided"
    page.reload()
    assert page.inner_text("#decided") == "6 of 20 decided"
    lines = exported(page, tmp_path / "review.csv")
    code, out, err = run(
        "clean", hostile, "--decisions", tmp_path / "review.csv", "--out", tmp_path / "a.jsonl", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["rows"], found["dropped"], found["relabelled"]) == (20, 2, 2)
    kept = {row["id"]: row for row in map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())}
    assert {"__proto__", '"><img src=x onerror="window.ran = 4">'}.isdisjoint(kept)
    labels = {row[0].removeprefix("'"): row[2] for row in lines if row[1] == "relabel"}
    assert {name: str(kept[name]["label"]) for name in ("=1+1", "-3")} == labels


_NAMELESS = """() => [...document.querySelectorAll('button, input, select, textarea, [role=tab], progress, [role=img]')]
  .filter((at) => at.checkVisibility()).filter((at) => !(at.ariaLabel || at.innerText?.trim() || at.labels?.length
    || document.getElementById(at.getAttribute('aria-labelledby'))?.textContent.trim())).map((at) => at.outerHTML)"""
_POINTING = """() => { const all = [...document.querySelectorAll('[id]')].map((at) => at.id);
  const to = [...document.querySelectorAll('[aria-controls], [aria-labelledby], [aria-describedby], label[for]')].map((at) =>
    ['aria-controls', 'aria-labelledby', 'aria-describedby', 'for'].map((name) => at.getAttribute(name)))
    .flat().filter(Boolean);
  return [all.filter((id, i) => all.indexOf(id) !== i), to.filter((id) => !all.includes(id))]; }"""
# WCAG 2.2: relative luminance, and the colours of all that lies behind a text.
_FAINT = """() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, base) => base.map((c, i) => i < 3 ? top[3] * top[i] + (1 - top[3]) * c : 1);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const v = c[i] / 255; return sum + weight * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const at = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || !at.checkVisibility() || at.closest('svg, script, style, option, :disabled')) continue;
    const behind = [];
    for (let up = at; up; up = up.parentElement) behind.unshift(parse(getComputedStyle(up).backgroundColor));
    const ground = behind.reduce((base, top) => over(top, base), [255, 255, 255, 1]);
    const ink = over(parse(getComputedStyle(at).color), ground), [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push([text, ratio]);
  }
  return found; }"""


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1280, "dark")])
def test_nobody_is_shut_out(report: Path, visit: Callable[..., Any], width: int, scheme: str) -> None:
    page = visit(report, width, scheme)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    page.evaluate("document.getElementById('filters').open = true")
    for number, name in enumerate(("Keep", "Relabel", "Drop")):
        item(page, number).get_by_role("button", name=name).click()
        item(page, number).get_by_role("button", name="Evidence").click()
    for tab in ("review", "trust", "figures", "run"):
        page.click(f"#tab-{tab}")
        page.mouse.move(0, 0)
        for narrower in (320, width):
            page.set_viewport_size({"width": narrower, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= narrower, tab
        assert page.evaluate(_NAMELESS) == [], tab
        assert page.evaluate(_FAINT) == [], tab
        # Letters of figures, as they come out on this screen.
        heights = page.evaluate(
            "[...document.querySelectorAll('svg text')].map((at) => at.getBoundingClientRect().height)"
        )
        assert all(height == 0 or height >= 11 for height in heights), (tab, min(heights))
    assert page.evaluate(_POINTING) == [[], []]
    assert page.evaluate("document.documentElement.lang") == "en"
    page.click("#tab-review")
    page.keyboard.press("?")
    assert page.evaluate(_FAINT) == []
    assert page.evaluate(_NAMELESS) == []


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of a page's time, and are seen elsewhere."""
    monkeypatch.setattr(report_page, "plots", lambda *_: [])


@pytest.mark.usefixtures("undrawn")
def test_a_sample_without_anything_known_but_its_score(visit: Callable[..., Any], tmp_path: Path) -> None:
    result = audit_result(["one", "two"], None, task="causal-lm", form="prompt and answer: 'q', targets in 'a'")
    write_report(tmp_path / "report.html", result)
    page = visit(tmp_path / "report.html")
    assert not page.locator("#by-kind").is_visible()
    assert not page.locator("#least").is_visible()
    page.keyboard.press("j")
    page.keyboard.press("2")
    assert page.evaluate("document.activeElement.className") == "new-label"
    page.keyboard.type("=a better\nanswer")
    page.keyboard.press("Tab")
    assert exported(page, tmp_path / "review.csv")[1:] == [["0", "relabel", "'=a better\nanswer", ""]]


@pytest.mark.usefixtures("undrawn")
def test_long_lists_come_in_parts(visit: Callable[..., Any], tmp_path: Path) -> None:
    n = 150
    write_report(tmp_path / "report.html", audit_result([f"text {i}" for i in range(n)], [i % 3 for i in range(n)]))
    page = visit(tmp_path / "report.html")
    assert page.locator(".sample").count() == 60
    item(page, 57).focus()
    for _ in range(5):
        page.keyboard.press("j")
    assert page.evaluate("document.activeElement.querySelector('.id bdi').textContent") == "62"
    assert page.locator(".sample").count() >= 120
