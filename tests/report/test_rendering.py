"""A report becomes a page, Markdown and pictures: nothing in it is taken for markup, and no number is lost."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from functools import reduce
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from PIL import Image

from abr_trainer.report.figure import Figure, Report, Section, Series
from abr_trainer.report.files import write_report
from abr_trainer.report.look import looks
from abr_trainer.report.markdown import render_markdown
from abr_trainer.report.page import numbers, render_page
from abr_trainer.report.pictures import save_pictures
from abr_trainer.report.text import DASH, number
from tests.report.sample import HOSTILE, NAMES, curves, excerpts, finals, hostile_report, points, sample_report

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a browser makes of a page: its elements, each with its attributes and the text right in it."""

    VOID = ("meta", "link", "br", "wbr", "path")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in self.VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for index in self.open:
            self.elements[index][2].append(data)

    def texts(self, *tags: str) -> list[str]:
        return ["".join(text) for tag, _, text in self.elements if tag in tags]

    def attributes(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes, _ in self.elements if tag in tags]


@pytest.fixture(scope="module")
def page():
    return Page(render_page(sample_report()))


def one_figure(figure: Figure) -> Report:
    return Report("One figure", (), (Section("It", (figure,)),))


def test_no_text_becomes_markup_or_script():
    page = Page(render_page(hostile_report()))
    assert len(page.texts("script")) == 4
    assert page.texts("b") == []
    assert page.texts("title") == page.texts("h1") == [HOSTILE]
    assert page.texts("pre") == [f"{HOSTILE}\n```"]
    assert json.loads(page.texts("script")[0])[0]["series"][0]["name"] == HOSTILE


def test_the_policy_of_the_page_lets_only_its_own_scripts_run(page):
    policy = next(meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta)
    scripts = page.texts("script")[1:]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:" in policy


def test_the_page_points_to_nothing_outside_it(page):
    targets = [
        value for _, attributes, _ in page.elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert {target for target in targets if not target.startswith("#")} == {"data:,"}
    assert "url(" not in page.texts("style")[0]
    assert "@import" not in page.texts("style")[0]


@pytest.mark.parametrize("figure", [curves(), points()], ids=["lines", "points"])
def test_every_point_of_a_figure_is_in_the_table_below_it(page, figure):
    cells = page.texts("th", "td")
    rows = {tuple(cells[index : index + 4]) for index in range(len(cells))}
    for series in figure.series:
        for index, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            low, high = (number(ends[index]) for ends in (series.low or series.y, series.high or series.y))
            band = DASH if y is None else f"{low} to {high}"
            assert (series.name, number(x), number(y), series.labels[index] if series.labels else band) in rows


def test_every_interval_of_a_figure_is_in_the_table_below_it(page):
    cells = page.texts("th", "td")
    for series in finals().series:
        assert number(series.center) in cells
        assert f"{number(series.low[0])} to {number(series.high[0])}" in cells
        assert f"{number(series.inner[0])} to {number(series.inner[1])}" in cells
        assert "; ".join(map(number, series.x)) in cells


def test_a_long_series_is_thinned_in_its_table_which_says_so():
    x = tuple(range(1000))
    table = numbers(replace(curves(), series=(Series("long", x, x), Series("short", (1,), (2,)))))
    assert len(table.rows) == 201
    assert table.rows[0][1] == "0"
    assert table.rows[199][1] == "999"
    assert table.notes == ("Of long, 200 of 1,000 rows are shown, evenly spaced.",)


def test_tables_name_their_rows_and_columns_and_can_be_scrolled_with_the_keyboard(page):
    assert {cell["scope"] for cell in page.attributes("th")} == {"row", "col"}
    assert len(page.texts("caption")) == len(page.texts("table"))
    regions = [div for div in page.attributes("div") if div.get("role") == "region"]
    assert len(regions) == len(page.texts("table"))
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)


def test_headings_are_in_order_and_every_link_has_its_target(page):
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.attributes("a")} <= set(ids)
    assert {figure.name for figure in sample_report().figures} <= set(ids)


@pytest.mark.parametrize("report", [sample_report(), hostile_report()], ids=["sample", "hostile"])
def test_markdown_tables_have_as_many_cells_in_each_row(report):
    markdown = render_markdown(report)
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert tables
    for table in tables:
        lines = table.splitlines()
        assert re.fullmatch(r"\|( ---:? \|)+", lines[1])
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_markdown_says_all_that_the_report_says():
    markdown = render_markdown(sample_report(), pictures="drawn")
    assert markdown.startswith("# Repeat schedulers at equal compute\n\n> ✓ **Better**")
    assert "\n\nFour arms, five seeds each, trained on `small-" in markdown
    assert "> ✗ **my_module:Mine is worse than baseline.**" in markdown
    assert (
        "> ✓ **Better**: With fixed:2, perplexity is lower.\n> 95 % interval -1.5 to -0.2, 5 of 5 seeds." in markdown
    )
    assert "- test perplexity: **19.71**" in markdown
    assert "<summary>Every cost</summary>" in markdown
    assert (
        "**Difference to baseline**\n\n![Paired by seed. Left of zero is better than the baseline.](drawn/diff"
        in markdown
    )
    assert "| **abr:loss_threshold=2.0,max_repeats=3** | **19.71** |" in markdown
    assert "```text\nabr train configs/demo.yaml --repeat_scheduler constant --seed 1" in markdown


def test_markdown_takes_no_text_for_markup():
    markdown = render_markdown(hostile_report())
    outside_code = re.sub(r"^(```+)text\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    folded = ("<details>\n<summary>1 more</summary>", f"<details>\n<summary>{escape(HOSTILE)}</summary>", "</details>")
    ours = reduce(lambda text, own: text.replace(own, ""), folded, outside_code)
    assert not re.search(r"(?<!\\)<", ours)
    assert "````text\n" + HOSTILE + "\n```\n````" in markdown


def test_of_many_texts_the_first_are_shown_and_the_others_folded(page):
    shown = [text for tag, attributes, text in page.elements if attributes.get("class") == "excerpt"]
    assert ["".join(text) for text in shown] == [text for _, text in excerpts().items]
    assert "2 more" in page.texts("summary")
    markdown = render_markdown(sample_report())
    assert markdown.index("row 9: loss") < markdown.index("<summary>2 more</summary>") < markdown.index("row 10: loss")


def test_a_verdict_comes_before_all_else_and_the_contents_after_it(page):
    classes = [attributes.get("class") for _, attributes, _ in page.elements]
    tags = [tag for tag, _, _ in page.elements]
    assert classes.index("verdict good") < tags.index("nav") < tags.index("section")
    assert page.texts("p")[:2] == ["better", "With fixed:2, perplexity is lower."]
    assert page.texts("dt", "dd")[:2] == ["batches", "2,000"]


def test_each_cell_of_a_table_of_many_columns_carries_its_heading(page):
    cells = page.attributes("td")
    assert {"mean", "95 % interval", "tokens per second"} <= {cell.get("data-label") for cell in cells}


def test_no_line_ends_before_a_percent_sign(page):
    assert "95\N{NO-BREAK SPACE}% interval -1.5 to -0.2, 5 of 5 seeds." in page.texts("p")


def test_a_log_axis_says_that_it_is_one_and_one_series_needs_no_legend(tmp_path):
    alone = replace(curves(), name="alone", series=(Series("only", (1, 2), (3.0, 4.0)),), y_log=False)
    save_pictures(Report("", (), (Section("", (curves(), alone)),)), tmp_path)
    texts = {name: re.findall(r"<!-- (.*) -->", (tmp_path / f"{name}.svg").read_text()) for name in ("alone",)}
    assert "only" not in texts["alone"]
    assert "validation perplexity" in texts["alone"]
    both = (tmp_path / "validation_perplexity.svg").read_text()
    assert "<!-- validation perplexity (log scale) -->" in both
    assert "<!-- fixed:2 -->" in both


def test_pictures_are_images_and_the_same_bytes_each_time(tmp_path):
    first, second = (save_pictures(sample_report(), tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first][:2] == ["validation_perplexity.png", "validation_perplexity.svg"]
    assert len(first) == 2 * len(sample_report().figures)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for path in first:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            with Image.open(path) as image:
                assert image.size[0] == 1050
                assert len(image.convert("RGB").getcolors(maxcolors=2**20)) > 20


@pytest.mark.parametrize("kind", ["lines", "points", "intervals"])
@pytest.mark.parametrize(
    "series",
    [
        (),
        (Series("a"),),
        (Series("a", (1.0, 2.0), (None, None)),),
        (Series("a", (math.inf, 0.0), (math.nan, -1.0), (0.0, None), (1.0, None)),),
        (Series("_a", (3.0,), (4.0,), (3.5,), (4.5,), labels=("$only$ one",)), Series("b")),
    ],
    ids=["no series", "no values", "missing", "not finite", "one value"],
)
@pytest.mark.parametrize("log", [False, True])
def test_what_cannot_be_drawn_is_left_out(tmp_path, kind, series, log):
    figure = Figure("odd", "$t_", "d", kind, "x", "y", series, x_log=log, y_log=log, whole_x=True, reference=0.0)
    assert all(path.stat().st_size for path in save_pictures(one_figure(figure), tmp_path))
    assert "NaN" not in Page(render_page(one_figure(figure))).texts("script")[0]


def test_a_name_looks_the_same_in_all_figures_and_like_no_other():
    look_of = looks(sample_report())
    assert tuple(look_of) == NAMES
    many = looks(Report("", (), (), names=tuple(map(str, range(30)))))
    assert len({(look.light, look.symbol) for look in many.values()}) == 30
    assert len({(look.light, look.dash) for look in many.values()}) == 30


def test_a_report_is_written_beside_what_is_there_already(tmp_path):
    kept = tmp_path / "plots" / "mine.png"
    kept.parent.mkdir()
    kept.write_bytes(b"mine")
    write_report(sample_report(), tmp_path)
    write_report(sample_report(), tmp_path)
    assert kept.read_bytes() == b"mine"
    pictures = {f"{figure.name}.{suffix}" for figure in sample_report().figures for suffix in ("png", "svg")}
    assert {path.name for path in kept.parent.iterdir()} == pictures | {"mine.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"plots", "report.html", "report.md"}
