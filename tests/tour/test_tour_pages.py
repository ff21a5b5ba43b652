"""What the tour promises of its pages: quotes are the source's, links lead somewhere, both languages say the same."""

import re
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
import trace_reading
from markdown_it import MarkdownIt

from tools import draw_tour, quote_tour

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "docs" / "tour"
CHAPTERS = sorted(page.name for page in TOUR.glob("0*.md"))
PAGES = quote_tour.pages()
NOTED = [ROOT / "docs" / "lab-notebook.md", ROOT / "docs" / "tensor_parallelism.md"]
TRACE = ROOT / "docs" / "traces" / "demo.jsonl"
VIEWS = {"02": "blocks", "03": "scheduler", "04": "attention", "08": "parallel"}

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[[^\]]+\]\((?:\.\./)?pictures/(\d\d)\.(en|zh)\.svg\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# A figure is a number with a decimal point, thousands or a per cent sign; small whole numbers count things.
FIGURE = re.compile(r"(?<![\w.:,/])(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\d+(?= %))(?![\d.]*\w)")
VERSION = re.compile(r"\b(?:vLLM|SGLang) \d+(?:\.\d+)+|[和与、,] ?\d\.\d\d\.\d|\b0\.\d+\.\d+|arXiv:\d+\.\d+|CACM \S+")
HEADINGS = {
    "en": ["Try it", "Check yourself", "Elsewhere", "Paper"],
    "zh": ["动手试", "自测", "别处怎么做", "论文"],
}


def name(page: Path) -> str:
    return str(page.relative_to(TOUR))


def language(page: Path) -> str:
    return "zh" if page.parent.name == "zh" else "en"


def asked(link: str) -> dict[str, str]:
    """What a link to the page asks it to show."""
    return dict(parse_qsl(link.partition("#")[2]))


def headings(text: str, level: str = "##") -> list[str]:
    return re.findall(rf"^{level} (.+)$", FENCE.sub("", text), re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    titles = headings(page.read_text(encoding="utf-8"), "#+")
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def figures(text: str) -> set[str]:
    """The figures of a text, as they are written, without those of code, papers and versions."""
    return set(FIGURE.findall(VERSION.sub("", re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", FENCE.sub("", text)))))


def test_there_are_nine_chapters_and_an_index_in_each_language() -> None:
    assert [chapter[:2] for chapter in CHAPTERS] == [f"0{n}" for n in range(1, 10)]
    assert sorted(page.name for page in (TOUR / "zh").glob("*.md")) == [*CHAPTERS, "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_quote_is_what_the_source_says_now(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == quote_tour.with_quotes(text)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_has_its_seven_elements(chapter: str) -> None:
    for lang, folder in (("en", TOUR), ("zh", TOUR / "zh")):
        text = (folder / chapter).read_text(encoding="utf-8")
        _, question, answer, picture = text.split("\n\n")[:4]
        assert re.fullmatch(r"\*\*[^*]+[?？]\*\*", question), "one question comes first"
        assert not answer.startswith(("#", "!", "<", "|")), "then its answer, in plain words"
        assert len(answer) > {"en": 400, "zh": 150}[lang]
        assert PICTURE.search(picture), "then the picture"
        assert len(quote_tour.quotes(text)) >= (1 if chapter.startswith("09") else 2)
        assert headings(text)[-4:] == HEADINGS[lang]
        assert [script[:2] for script in quote_tour.scripts(text)] == [chapter[:2]]
        assert text.count("<details>") == text.count("</details>") == 1


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_both_languages_have_the_same_quotes_pictures_outputs_and_figures(chapter: str) -> None:
    english, chinese = ((folder / chapter).read_text(encoding="utf-8") for folder in (TOUR, TOUR / "zh"))
    assert quote_tour.quotes(english) == quote_tour.quotes(chinese)
    assert len(headings(english)) == len(headings(chinese))
    assert [n for n, _ in PICTURE.findall(english)] == [n for n, _ in PICTURE.findall(chinese)] == [chapter[:2]]
    assert {lang for _, lang in PICTURE.findall(english)} == {"en"} and "zh.svg" in chinese
    for script in quote_tour.scripts(english):
        outputs = (quote_tour.shown_output(text, script) for text in (english, chinese))
        assert len({tuple(quote_tour.fixed_lines(output)) for output in outputs}) == 1
    assert figures(english) == figures(chinese)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_figure_is_in_the_notebook_or_printed_by_the_script(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    noted = "\n".join(source.read_text(encoding="utf-8") for source in NOTED)
    printed = "\n".join(quote_tour.shown_output(text, script) for script in quote_tour.scripts(text))
    known = set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", f"{noted}\n{printed}"))
    assert not figures(text) - known


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        file, _, anchor = link.partition("#")
        if "://" in link or file.endswith("demo.html"):
            continue
        target = (page.parent / file).resolve()
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_ends_with_its_view_of_the_page_and_the_next_chapter(chapter: str) -> None:
    for folder, up in ((TOUR, "../"), (TOUR / "zh", "../../")):
        links = LINK.findall((folder / chapter).read_text(encoding="utf-8").rstrip().splitlines()[-1])
        recorded = [link for link in links if link.startswith(f"{up}demo.html#")]
        view, lang = VIEWS.get(chapter[:2]), language(folder / chapter)
        assert [asked(link)["view"] for link in recorded] == ([view] if view else [])
        assert all(asked(link)["lang"] == lang for link in recorded)
        assert (f"http://127.0.0.1:8000/#view={view}&lang={lang}" in links) == (view is not None)
        following = CHAPTERS[CHAPTERS.index(chapter) + 1 :][:1]
        other = f"zh/{chapter}" if lang == "en" else f"../{chapter}"
        assert all(file in links for file in [*following, "README.md", other])


@pytest.mark.parametrize("chapter", [chapter for chapter in CHAPTERS if chapter[:2] in VIEWS])
def test_the_recorded_step_that_a_chapter_opens_shows_what_the_chapter_is_about(chapter: str) -> None:
    steps = trace_reading.steps(trace_reading.read(TRACE))
    for folder in (TOUR, TOUR / "zh"):
        (link,) = (link for link in LINK.findall((folder / chapter).read_text("utf-8")) if "demo.html#" in link)
        query = asked(link)
        tables, digests = {}, {}
        for step in steps:
            owners = trace_reading.owners(step, tables, digests)
            if step["n"] == int(query["step"]):
                break
        cached = [block for block, digest in digests.items() if digest and block not in owners]
        assert {
            "blocks": cached and max(owners.values()) > 1,
            "scheduler": "preempt" in {event["what"] for event in step["events"]},
            "attention": [query.get("request"), "decode"] in [entry[:2] for entry in step["batch"]],
            "parallel": {kind for _, kind, *_ in step["batch"]} == {"decode"},
        }[query["view"]]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_source_file_that_a_page_names_exists(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    files = [file for file in re.findall(r"`((?:\w+/)+\w+\.py)`", text) if not file.startswith("vllm/")]
    assert not [file for file in files if not any((root / file).exists() for root in (ROOT / "nanovllm", ROOT))]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_mark_of_markdown_is_left_over(page: Path) -> None:
    """Chinese has no spaces, which Markdown's emphasis wants in some places."""
    html = MarkdownIt().enable("table").render(page.read_text(encoding="utf-8"))
    prose = re.sub(r"<pre>.*?</pre>|<code>.*?</code>", "", html, flags=re.DOTALL)
    assert "**" not in prose and "](" not in prose


def test_the_index_of_each_language_links_all_chapters_in_order() -> None:
    for folder in (TOUR, TOUR / "zh"):
        links = LINK.findall((folder / "README.md").read_text(encoding="utf-8"))
        assert [link for link in links if link in CHAPTERS] == CHAPTERS


def test_a_quote_of_a_name_or_line_that_is_gone_is_refused_by_name(tmp_path: Path) -> None:
    for marker, error in (
        ("nanovllm/engine/scheduler.py Scheduler.no_such", "scheduler.py has no Scheduler.no_such"),
        ("nanovllm/engine/no_such.py f", "nanovllm/engine/no_such.py does not exist"),
        ('nanovllm/engine/scheduler.py Scheduler.add "no such line"', "no line that begins with 'no such line'"),
    ):
        with pytest.raises(ValueError, match=re.escape(error)):
            quote_tour.with_quotes(f"<!-- quote: {marker} -->\n<!-- /quote -->\n")
    with pytest.raises(ValueError, match="1 quotes begin, but only 0"):
        quote_tour.with_quotes("<!-- quote: nanovllm/engine/scheduler.py Scheduler.add -->\nno end\n")


def test_a_quote_is_the_lines_of_its_name_without_their_indentation() -> None:
    text = '<!-- quote: nanovllm/engine/scheduler.py Scheduler.add "self.waiting" -->\nold\n<!-- /quote -->\n'
    lines = quote_tour.with_quotes(text).splitlines()
    assert lines[1:-1] == [
        "```python",
        "# nanovllm/engine/scheduler.py: Scheduler.add",
        "self.waiting.append(seq)",
        "```",
    ]


def test_pictures_have_a_file_for_each_chapter_and_language() -> None:
    wanted = {draw_tour.path(chapter[:2], lang).name for chapter in CHAPTERS for lang in draw_tour.LANGUAGES}
    assert {file.name for file in draw_tour.TARGET.iterdir()} == wanted
    assert list(draw_tour.PICTURES) == [chapter[:2] for chapter in CHAPTERS]
