"""Takes the screenshots of the page in docs/screenshots, from docs/demo.html, in headless Chromium.

python tools/page_screenshots.py        needs Debian's chromium, the package playwright, and a Chinese font
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[1]
DEMO, FOLDER = ROOT / "docs" / "demo.html", ROOT / "docs" / "screenshots"
MOST_BYTES = 150_000
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
DESKTOP, PHONE = {"width": 1200, "height": 760}, {"width": 360, "height": 780}

# A picture's name, the size of the window, and what the page's address says behind `#`.
PICTURES = [
    ("blocks-en-light", DESKTOP, "view=blocks&lang=en&theme=light&step=15"),
    ("blocks-zh-dark", DESKTOP, "view=blocks&lang=zh&theme=dark&step=15"),
    ("scheduler-en-dark", DESKTOP, "view=scheduler&lang=en&theme=dark&step=100"),
    ("attention-en-light", DESKTOP, "view=attention&lang=en&theme=light&step=131"),
    ("parallel-zh-light", DESKTOP, "view=parallel&lang=zh&theme=light&step=15"),
    ("phone-en-light", PHONE, "view=blocks&lang=en&theme=light&step=15"),
    ("phone-zh-dark", PHONE, "view=scheduler&lang=zh&theme=dark&step=100"),
]


def take(browser: Browser, name: str, size: dict[str, int], address: str) -> None:
    """Write one picture. Raises ValueError if it is larger than a repository likes."""
    page = browser.new_page(viewport=size)
    page.goto(f"{DEMO.as_uri()}#{address}")
    page.wait_for_selector("#stat-step")
    page.wait_for_timeout(250)
    path = FOLDER / f"{name}.png"
    page.screenshot(path=path)
    page.close()
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: at most {MOST_BYTES} are allowed")


def main() -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no chromium: apt-get install chromium")
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for picture in PICTURES:
            take(browser, *picture)
        browser.close()


if __name__ == "__main__":
    main()
