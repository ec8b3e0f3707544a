"""The page as a reader meets it: in a browser, on a phone and a screen, by day and by night, by mouse and by key."""

from __future__ import annotations

import pytest

from abr_trainer.comparison.collecting import read_comparison
from abr_trainer.report.of_comparison import report_on_comparison
from abr_trainer.report.of_run import report_on_run
from abr_trainer.report.page import render_page
from abr_trainer.report.text import number
from tests.report.browser import CONTRASTS, chromium, show
from tests.report.dropped import drop, write_run, write_slow_run
from tests.report.sample import HOSTILE, hostile_report, odd_report, sample_report
from tests.report.test_examples import EXAMPLES

pytestmark = pytest.mark.slow

PHONE, SCREEN = (390, 844), (1280, 900)
SMALL_PHONE, TABLET, WIDE = (360, 740), (768, 1024), (1600, 1000)

TOO_WIDE = """
const isText = (node) => !node.closest("svg") && node.clientWidth && !node.matches(".hidden, .skip, script, noscript");
return [...document.body.querySelectorAll("*")].filter(isText).filter((node) =>
  node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).display !== "inline"
  || node.getBoundingClientRect().right > innerWidth + 1
).map((node) => [node.tagName, node.className, node.clientWidth, node.scrollWidth]);
"""
OPEN_ALL = "document.querySelectorAll('details').forEach((details) => (details.open = true))"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    drops = [drop(i % 6 + 1, i // 6, i, 5.0 + i, f"{'word ' * 30}{'x' * 300}") for i in range(13)]
    reports = {
        "sample": sample_report(),
        "hostile": hostile_report(),
        "odd": odd_report(),
        "run": report_on_run(write_run(folder / "data", drops)),
        "slow": report_on_run(write_slow_run(folder / "slow data", evaluation_seconds=20.0, total_seconds=100.0)),
        **{path.name: report_on_comparison(read_comparison(path)) for path in EXAMPLES},
    }
    for name, report in reports.items():
        (folder / name).mkdir()
        (folder / name / "report.html").write_text(render_page(report), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as session:
        yield session


@pytest.fixture
def look_at(browser, pages):
    """Open a page, and afterwards make sure that it asked for nothing and that nothing went wrong in it."""

    def open_page(name="sample", size=SCREEN, scheme="light", media=""):
        show(browser, pages / name / "report.html", *size, scheme, media)
        return browser

    yield open_page
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("name", ["sample", "hostile", "odd"])
@pytest.mark.parametrize("size", [SMALL_PHONE, PHONE, SCREEN], ids=["small phone", "phone", "screen"])
def test_the_page_never_scrolls_sideways(look_at, size, name):
    page = look_at(name, size)
    page.execute_script(OPEN_ALL)
    assert page.execute_script("return document.documentElement.scrollWidth") <= size[0]


@pytest.mark.parametrize("size", [PHONE, TABLET, SCREEN, WIDE], ids=["phone", "tablet", "screen", "wide"])
@pytest.mark.parametrize(
    ("name", "scheme"), [("run", "dark"), ("slow", "dark"), *((path.name, "light") for path in EXAMPLES[::2])]
)
def test_nothing_on_a_real_page_is_wider_than_what_it_is_in(look_at, name, size, scheme):
    page = look_at(name, size, scheme)
    assert page.execute_script(TOO_WIDE) == []
    page.execute_script(OPEN_ALL)
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert page.execute_script(TOO_WIDE) == []
    assert [found for found in page.execute_script(CONTRASTS) if found[0] < 4.5] == []


def test_on_a_phone_the_verdict_comes_first_and_rows_are_cards(look_at):
    page = look_at("stories260k-wikitext2", PHONE)
    heights = (
        "return ['.verdict', 'nav', 'section'].map((some) => document.querySelector(some).getBoundingClientRect().top)"
    )
    assert page.execute_script(heights) == sorted(page.execute_script(heights))
    label = "return getComputedStyle(document.querySelector('.cards td'), '::before').content"
    assert page.execute_script(label) == '"test perplexity"'
    page = look_at("stories260k-wikitext2", SCREEN)
    assert page.execute_script(label) == "none"
    assert page.find_element("css selector", ".verdict .badge").text == "worse"


def test_one_series_has_no_legend_and_a_log_axis_is_named(look_at):
    page = look_at("run")
    assert page.find_elements("css selector", "#learning_rate .legend") == []
    page = look_at("stories260k-wikitext2")
    assert "validation perplexity (log scale)" in page.find_element("css selector", "#curves .chart").text
    labels = page.find_elements("css selector", '#curves [aria-label="y-axis tick label"] text')
    ticks = page.find_elements("css selector", '#curves [aria-label="y-axis tick"] path')
    assert len([label for label in labels if label.text]) == len(ticks) > 3, "every tick has its number"


@pytest.mark.parametrize("size", [PHONE, SCREEN], ids=["phone", "screen"])
def test_every_figure_is_drawn_and_none_of_its_text_is_cut_off(look_at, size):
    page = look_at(size=size)
    for figure in sample_report().figures:
        svg = page.find_element("css selector", f"#{figure.name} .drawing > svg[role=img]")
        assert svg.get_attribute("aria-label") == f"{figure.title}. {figure.description}"
        assert len(svg.find_elements("css selector", "[aria-label=dot] > *")) >= 3 * len(figure.series)
        cut_off = """
            const frame = arguments[0].getBoundingClientRect();
            return [...arguments[0].querySelectorAll("text")].filter((text) => {
              const box = text.getBoundingClientRect();
              return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
            }).map((text) => text.textContent);"""
        assert page.execute_script(cut_off, svg) == []


@pytest.mark.parametrize("size", [PHONE, SCREEN], ids=["phone", "screen"])
def test_where_the_time_went_is_read_at_a_glance(look_at, size):
    page = look_at("slow", size)
    (section,) = [
        each
        for each in page.find_elements("css selector", "section")
        if each.find_element("css selector", "h2").text == "Where the time went"
    ]
    assert section.find_elements("css selector", "#waiting .drawing > svg[role=img] [aria-label=dot] > *")
    table = section.find_element("css selector", "table")
    rows = [" ".join(row.text.split()) for row in table.find_elements("css selector", "tbody tr")]
    assert any("waiting for data" in row and "12.0" in row and "12.0 %" in row for row in rows), rows


def test_charts_are_drawn_anew_when_the_window_changes(look_at):
    page = look_at(size=SCREEN)
    wide = page.find_element("css selector", ".drawing > svg").size["width"]
    resized = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", resized)
    settled = "const done = arguments[0]; setTimeout(() => requestAnimationFrame(() => done()), 100)"
    page.execute_async_script(settled)
    svg = page.find_element("css selector", ".drawing > svg")
    assert svg.get_attribute("width") == str(svg.size["width"])
    assert svg.size["width"] < 390 < wide


@pytest.mark.parametrize("size", [PHONE, SCREEN], ids=["phone", "screen"])
def test_text_stands_out_by_day_and_by_night(look_at, size):
    grounds = {}
    for scheme in ("light", "dark"):
        page = look_at(size=size, scheme=scheme)
        page.execute_script(OPEN_ALL)
        grounds[scheme] = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        contrasts = page.execute_script(CONTRASTS)
        assert len(contrasts) > 200
        assert [found for found in contrasts if found[0] < 4.5] == []
    assert grounds == {"light": "rgb(247, 248, 250)", "dark": "rgb(16, 19, 25)"}


def test_a_print_is_dark_on_light_by_night_too(look_at):
    page = look_at(scheme="dark", media="print")
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [found for found in page.execute_script(CONTRASTS) if found[0] < 4.5] == []


def test_the_number_shows_where_the_pointer_is(look_at):
    from selenium.webdriver import ActionChains

    page = look_at()
    figure = sample_report().figures[0]
    svg = page.find_element("css selector", f"#{figure.name} .drawing > svg")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    last = svg.find_elements("css selector", "[aria-label=dot]")[0].find_elements("css selector", "*")[-1]
    ActionChains(page).move_to_element(last).perform()
    tip = svg.find_element("css selector", "[aria-label=tip] text").get_attribute("textContent")
    series = figure.series[0]
    assert series.name in tip
    assert f"passes (forward and backward over a\u200bbatch): {number(series.x[-1])}" in tip
    assert f"validation perplexity: {number(series.y[-1])}" in tip
    assert f"band: {number(series.low[-1])} to {number(series.high[-1])}" in tip


def test_everything_that_scrolls_can_be_reached_by_key(look_at):
    from selenium.webdriver import ActionChains, Keys

    page = look_at(size=PHONE)
    regions = page.find_elements("css selector", "[role=region]:not(details *)")
    left = [region.get_attribute("aria-label") for region in regions]
    assert len(left) == 2
    for presses in range(40):
        ActionChains(page).send_keys(Keys.TAB).perform()
        focused = page.switch_to.active_element
        assert focused.value_of_css_property("outline-style") == "solid"
        assert presses or focused.text == "Skip to the content"
        if focused.get_attribute("aria-label") == left[0]:
            left.pop(0)
        if not left:
            break
    assert left == []


@pytest.mark.parametrize("size", [PHONE, SCREEN], ids=["phone", "screen"])
def test_odd_figures_are_drawn_too(look_at, size):
    page = look_at("odd", size)
    svgs = page.find_elements("css selector", ".drawing > svg")
    assert len(svgs) == len(odd_report().figures)
    assert all(svg.find_elements("css selector", "[aria-label=dot] > *") for svg in svgs)
    assert all("NaN" not in svg.get_attribute("outerHTML") for svg in svgs)


def test_a_hostile_name_is_shown_and_not_obeyed(look_at):
    page = look_at("hostile")
    assert page.title == HOSTILE
    assert page.find_element("css selector", ".legend span").get_attribute("textContent") == HOSTILE
    assert page.find_elements("css selector", "b") == []
    assert page.find_element("css selector", "#empty .no-data").text == "No data"
