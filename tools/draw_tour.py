"""Draws the pictures of docs/tour, each in English and in Chinese, from the engine's real data and measured figures.

python tools/draw_tour.py            all pictures
python tools/draw_tour.py 02 08      those of these chapters
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import tour_device_pictures, tour_measured_pictures, tour_memory_pictures  # noqa: E402 -- the path comes first

TARGET = ROOT / "docs" / "tour" / "pictures"
LANGUAGES = ("en", "zh")

PICTURES: dict[str, Callable[[str], str]] = {
    "01": tour_memory_pictures.paging,
    "02": tour_memory_pictures.blocks,
    "03": tour_memory_pictures.schedule,
    "04": tour_device_pictures.attention,
    "05": tour_device_pictures.rows,
    "06": tour_measured_pictures.ablation,
    "07": tour_device_pictures.sampler,
    "08": tour_measured_pictures.ranks,
    "09": tour_measured_pictures.roofline,
}


def path(chapter: str, language: str) -> Path:
    """Where a chapter's picture lies."""
    return TARGET / f"{chapter}.{language}.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", help="default: all")
    args = parser.parse_args()
    unknown = sorted(set(args.chapters) - set(PICTURES))
    if unknown:
        parser.error(f"chapters {unknown} have no picture: choose from {list(PICTURES)}")
    TARGET.mkdir(exist_ok=True)
    for chapter in args.chapters or PICTURES:
        for language in LANGUAGES:
            path(chapter, language).write_text(PICTURES[chapter](language), encoding="utf-8")


if __name__ == "__main__":
    main()
