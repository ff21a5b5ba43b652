"""Every script of the tour runs on a CPU in seconds, and prints what the chapters say that it prints."""

import runpy

import pytest

from tools import quote_tour

SCRIPTS = sorted(path.name for path in quote_tour.TRY.glob("*.py"))
PAGES = {page.name[:2]: page for page in quote_tour.pages() if page.parent == quote_tour.TOUR}


def check_output(script: str, output: str) -> None:
    text = PAGES[script[:2]].read_text(encoding="utf-8")
    shown = quote_tour.shown_output(text, script)
    assert quote_tour.fixed_lines(output) == quote_tour.fixed_lines(shown)
    count = [line.startswith(quote_tour.VARIES) for line in output.splitlines()].count(True)
    assert count == [line.startswith(quote_tour.VARIES) for line in shown.splitlines()].count(True)


def test_each_chapter_has_a_script() -> None:
    assert [script[:2] for script in SCRIPTS] == [chapter for chapter in PAGES if chapter.isdigit()]


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_a_script_prints_what_its_chapter_says(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(quote_tour.TRY / script), run_name="__main__")
    check_output(script, capsys.readouterr().out)


def test_a_script_runs_as_a_program_of_its_own() -> None:
    check_output(SCRIPTS[0], quote_tour.run_script(SCRIPTS[0]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_first_what_it_asks_and_what_to_expect(script: str) -> None:
    source = (quote_tour.TRY / script).read_text(encoding="utf-8")
    docstring = source.split('"""')[1]
    assert docstring.splitlines()[0].endswith("?") and "Expect: " in docstring
    assert len(source.splitlines()) <= 100
