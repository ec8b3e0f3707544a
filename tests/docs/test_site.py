"""The documentation site: it builds, is read without a network, and what its pages say exists."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections import deque
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("furo")
pytest.importorskip("myst_parser")

from sphinx.cmd.build import build_main as sphinx_build

import abr_trainer.cli
from abr_trainer import ABRConfig, ABRTrainer, Observation
from abr_trainer.data.demo import DEMO_MODEL
from abr_trainer.report.verdicts import BADGES, verdicts
from tests.conftest import QUIET, ROOT, tiny_llama, token_rows
from tests.docs.prose import sentences
from tests.report.browser import chromium, show

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))
OLD_REPORTS = [page for page in PAGES if re.fullmatch(r"compare/[^/]+/report", page)]
"""Made by `abr report`, at the time of the comparison."""
OWN = [page for page in PAGES if page not in OLD_REPORTS]
MOST_WORDS = 34
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """What a built page loads, where it links to, and the words between its own headings and tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.words = 0
        self.blocks = 0
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.links.append(given.get("href", ""))
        elif tag == "link" and given.get("rel") not in ("index", "search", "next", "prev"):
            self.loads.append(given["href"])
        self.loads += [url for name in ("src", "poster", "data") if (url := given.get(name))]
        self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.loads += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style", ""))
        if "article" in self._open and tag in ("p", "li", "td", "dd"):
            self.blocks += 1
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "article" in self._open and not {"script", "style"} & set(self._open):
            self.words += len(data.split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):  # in this process, which has imported what the reference describes
        status = sphinx_build(["-q", "-W", "--keep-going", str(DOCS), str(out)])
    assert status == 0, said.getvalue()
    return out


@pytest.fixture(scope="module")
def built(site: Path) -> dict[str, Page]:
    found = site.rglob("*.html")
    return {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8")) for path in found}


def target_of(page: str, link: str) -> str | None:
    """Return the file that a link of a built page leads to; None if it leads out of the site or within the page."""
    path = unquote(re.split("[#?]", link)[0])
    if not path or re.match(r"\w+:", path):
        return None
    parts: list[str] = []
    for part in (*page.split("/")[:-1], *path.split("/")):
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def test_every_page_is_reached_from_the_first(built):
    reached, waiting = {"index.html"}, deque(["index.html"])
    while waiting:
        page = waiting.popleft()
        for link in built[page].links:
            target = target_of(page, link)
            if target in built and target not in reached:
                reached.add(target)
                waiting.append(target)
    assert {f"{page}.html" for page in PAGES} <= reached


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_a_stub(built, page):
    found = built[f"{page}.html"]
    assert found.blocks >= 5
    assert found.words >= 80


def test_every_link_between_built_pages_leads_to_a_file(site, built):
    targets = {target_of(page, link) for page, found in built.items() for link in (*found.links, *found.loads)}
    assert [target for target in targets - {None} if not (site / target).exists()] == []


def test_pages_load_nothing_from_a_network(site, built):
    loaded = {(page, url) for page, found in built.items() for url in found.loads}
    sheets = [(path.name, url) for path in site.rglob("*.css") for url in urls_of_style(path.read_text("utf-8"))]
    assert [(page, url) for page, url in (*loaded, *sheets) if re.match(r"(?!data:)\w+:|//", url)] == []


def urls_of_style(style: str) -> list[str]:
    return re.findall(r"url\(\s*['\"]?([^'\")]+)", style) + re.findall(r"@import\s+['\"]([^'\"]+)", style)


def test_the_search_knows_the_words_of_the_pages(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    known = json.loads(index[index.index("{") : index.rindex("}") + 1])
    names = known["docnames"]
    found = known["terms"]["outlier"]
    assert "rules/skipping" in {names[at] for at in (found if isinstance(found, list) else [found])}


SOME = ("index", "rules/index", "measure/effectiveness")


@pytest.mark.launches
@pytest.mark.parametrize(
    ("width", "scheme", "pages"),
    [(390, "dark", [*OWN, OLD_REPORTS[0]]), (390, "light", SOME), (1280, "dark", SOME)],
    ids=["phone", "phone, light", "screen"],
)
def test_no_page_is_wider_than_the_window(site, browser, width, scheme, pages):
    wide = {}
    for page in pages:
        show(browser, site / f"{page}.html", width, 844, scheme)
        taken = browser.execute_script("return document.documentElement.scrollWidth")
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
        if taken > width or [url for url in loaded if not url.startswith(("file:", "data:"))]:
            wide[page] = (taken, loaded)
    assert wide == {}
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as session:
        yield session


# ---- What stands in the Markdown ----


def read(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def test_every_relative_link_leads_to_a_file():
    for path in (ROOT / "README.md", *(DOCS / f"{page}.md" for page in PAGES)):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)", text)
        files = [unquote(link.partition("#")[0]) for link in links if not re.match(r"\w+:", link)]
        assert [file for file in files if file and not (path.parent / file).exists()] == [], path


def test_tests_are_named_in_the_support_matrix_only():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"def (test_\w+)\(", tests))
    named = {page: names & set(re.findall(r"\btest_\w+", read(page))) for page in PAGES}
    assert {page for page, found in named.items() if found} <= {"reference/support"}
    assert named["reference/support"], "the matrix names the tests that show what it says"


@pytest.mark.parametrize("page", [page for page in OWN if page != "reference/flags"])  # which lists choices
def test_no_sentence_is_too_long_to_be_read_once(page):
    assert [each for each in sentences(read(page)) if len(each.split()) > MOST_WORDS] == []


@pytest.mark.parametrize("page", ["index", "abr", "window", "learnable", "gain", "replay", "easy", "controls"])
def test_the_verdict_on_a_rule_is_what_was_measured(page):
    said = re.sub(r"<details>.*</details>", "", read(f"rules/{page}"), flags=re.DOTALL)
    changes = {f"{'+' if kind == 'worse' else '-'}{size} %" for size, kind in VERDICT.findall(said)}
    changes |= set(re.findall(r"[+-]\d+\.\d %", said))
    assert changes
    assert {change for change in changes if change not in read("measure/effectiveness")} == set()


def test_every_page_gives_the_same_figures_for_broken_rows_and_batches():
    texts = [(ROOT / "README.md").read_text(encoding="utf-8"), *map(read, ("index", "rules/index", "rules/skipping"))]
    texts.append(read("rules/rows"))
    rows = [found for text in texts for found in re.findall(r"drops(?:\]\[rows\])? \[?(\d+ to \d+) % of", text)]
    batches = [
        found for text in texts for found in re.findall(r"skip(?:s|ped)\s+(\S+) % of (?:them|(?:the )?broken)", text)
    ]
    assert (len(rows), len(set(rows))) == (3, 1)
    assert (len(batches), set(batches)) == (3, {"98.5"})
    assert "98.5 % (842 of 855)" in read("rules/skipping")


def test_the_verdicts_of_a_comparison_are_those_that_the_program_gives():
    page = read("measure/compare")
    quoted = re.search(r"<!-- output: compare -->\n```text\n(.*?)```", page, re.S)[1].splitlines()
    data = json.loads((DOCS / "compare" / "stories260k-wikitext2" / "comparison.json").read_text(encoding="utf-8"))
    notices = verdicts(data, [arm for arm in data["arms"] if arm["seeds"]])
    given = {line for notice in notices for line in notice.plain(100)}
    assert len(quoted) > 5
    assert set(quoted) <= {"...", *given}
    assert [word for word in ("better", "worse", "no verdict", *BADGES.values()) if f"**{word}**" not in page] == []


VERDICT = re.compile(r"(\d+\.\d) %\s+(better|worse)")

FENCES = [(page, *fence) for page in OWN for fence in re.findall(r"^```(\w+)\n(.*?)^```", read(page), re.M | re.S)]
FLAGS = json.loads(Path(abr_trainer.cli.__file__).with_name("flags.json").read_text(encoding="utf-8"))


EVERYWHERE = {"--help", "--help-all", "--config"}


def flags_of(verb: str) -> set[str]:
    described = FLAGS["verbs"][verb]
    given = [*described["flags"], *(FLAGS["trainer"] if described["takes_trainer"] else ())]
    of_trl = {f"--{name}" for name in described.get("of_trl", ())}
    return {name for flag in given for name in flag["names"]} | of_trl


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Yield the page, the verb and the words of each command `abr ...` in a block of code."""
    for page, language, code in FENCES:
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            start = next((i + 1 for i, word in enumerate(words) if word in ("abr", "abr_trainer")), len(words))
            if start < len(words):
                yield page, words[start], words[start + 1 :]


def test_every_flag_of_a_command_is_one_that_it_takes():
    shown = list(commands())
    assert len(shown) > 40
    unknown = []
    for page, verb, words in shown:
        cut = words.index("--") if "--" in words else len(words)
        of_runs = "classify" if verb == "compare-prompts" else "sft" if "sft" in words[:cut] else "train"
        for part, of in ((words[:cut], verb), (words[cut + 1 :], of_runs)):
            flags = {word.partition("=")[0] for word in part if word.startswith("--")}
            unknown += [(page, verb, flag) for flag in flags - flags_of(of) - EVERYWHERE]
    assert unknown == []


def test_every_key_of_a_file_of_flags_is_a_flag():
    keys = {}
    for page, language, code in FENCES:
        if language == "yaml" and page.startswith("start/"):
            keys[page] = {f"--{key}" for key in re.findall(r"^(\w+):", code, re.M)} - {"--env"}
    assert keys["start/your-data"] <= flags_of("train")
    assert all(found <= flags_of("sft") | flags_of("train") for found in keys.values())


def python_of(page: str) -> list[str]:
    return [code for of, language, code in FENCES if (of, language) == (page, "python")]


def test_the_rules_of_ones_own_decide_as_the_page_says():
    names: dict[str, object] = {}
    for code in python_of("rules/your-own"):
        if "ABRTrainer(..." not in code:
            exec(code, names)  # its own assertions stand in it
    first, stalls = names["OnlyTheFirstHalf"](), names["UntilItStalls"]()
    seen = [Observation(0, loss, progress) for loss, progress in ((4.0, 0.1), (4.0, 0.9), (2.0, 0.1))]
    assert [first.decide(each) for each in seen] == [2, 1, 1]
    assert names["rule"].decide(Observation(7, 4.0, 0.1)) == 1
    assert names["rule"].decide(Observation(8, 4.0, 0.1)) == 3
    assert [stalls.goes_on(seen[0], losses, None) for losses in ([4.0, 3.0], [4.0, 3.99])] == [True, False]


@pytest.mark.parametrize(("name", "repeats"), [("UntilItStalls", 2.0), ("OnceMoreAfterTheNext", 1.0)])
def test_a_rule_of_ones_own_trains(tmp_path, name, repeats):
    names: dict[str, object] = {}
    for code in python_of("rules/your-own"):
        if f"class {name}" in code:
            exec(code, names)
    config = ABRConfig(output_dir=str(tmp_path), max_steps=4, learning_rate=1e-6, **QUIET)
    trainer = ABRTrainer(model=tiny_llama(), args=config, train_dataset=token_rows(32), repeat_scheduler=names[name]())
    trainer.train()
    trace = [json.loads(line) for line in (tmp_path / "abr_trace.jsonl").read_text().splitlines()]
    assert [batch["repeats"] for batch in trace] == [repeats] * 4
    replayed = [batch.get("replayed", []) for batch in trace]
    assert [[each["step"] for each in some] for some in replayed] == (
        [[], [1], [2], [3]] if name == "OnceMoreAfterTheNext" else [[]] * 4
    )


def test_the_callback_stops_a_run_whose_batches_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = python_of("rules/callbacks")
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in token_rows(64)]
    code = code.replace('"runs/callback"', '"runs/callback", max_consecutive_skips=99, max_steps=60, **QUIET')
    names = {"model": tiny_llama(), "train_dataset": rows, "QUIET": QUIET}
    exec(code, names)
    assert names["trainer"].ledger.skips == names["trainer"].ledger.batches == 50
    assert "Batch 1 was skipped (no targets)" in capsys.readouterr().out


def test_the_script_and_what_reads_its_trace_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [f"The fox saw {n} birds.\n" for n in range(40)]
    (tmp_path / "notes.txt").write_text("\n".join(lines))
    script = python_of("start/python")[0]
    quick = script.replace('"HuggingFaceTB/SmolLM2-135M"', repr(str(DEMO_MODEL)))
    quick = quick.replace("max_passes=2000", "max_passes=4, use_cpu=True, report_to='none', disable_tqdm=True")
    names: dict[str, object] = {}
    exec(quick, names)
    assert names["trainer"].ledger.passes == 4
    (reading,) = python_of("measure/reports")
    exec(reading.replace("runs/demo", "runs/python"), names)
    assert len(names["trace"]) == names["trainer"].ledger.batches
    assert "count" in capsys.readouterr().out
