"""The tour's pictures are what the scripts draw today, and measured figures are those of their source."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools import draw_tour
from tools.tour_measured_pictures import FIGURES
from tools.tour_svg import Sheet

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("chapter", draw_tour.PICTURES)
def test_a_picture_is_what_the_script_draws_from_the_engine(chapter: str) -> None:
    for language in draw_tour.LANGUAGES:
        drawn = draw_tour.PICTURES[chapter](language)
        assert draw_tour.path(chapter, language).read_text(encoding="utf-8") == drawn
        ElementTree.fromstring(drawn)


def test_every_measured_figure_of_a_picture_is_in_its_source() -> None:
    def numbers(value: object) -> list[float]:
        if isinstance(value, int | float):
            return [value]
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return [number for item in items for number in numbers(item)]

    for name, entry in json.loads(FIGURES.read_text(encoding="utf-8")).items():
        source = (ROOT / entry["source"]).read_text(encoding="utf-8")
        assert re.search(rf"^#+ {re.escape(entry['section'])}$", source, re.MULTILINE), name
        noted = {float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*(?:\.\d+)?", source)}
        found = numbers(entry)
        assert len(found) > 5
        assert not [number for number in found if number not in noted | {100}], name


def test_what_would_leave_the_sheet_is_refused() -> None:
    sheet = Sheet(100, 100, "zh", "a sheet")
    with pytest.raises(ValueError, match="'一二三四五六七八' .* leaves the sheet of 100 x 100"):
        sheet.text(10, 50, ("short", "一二三四五六七八"))
    with pytest.raises(ValueError, match="a box at .* leaves the sheet"):
        sheet.rect(90, 0, 20, 10)
