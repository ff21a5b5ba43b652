"""Takes the screenshots of the page in docs/screenshots, from docs/demo.html, in headless Chromium.

python tools/page_screenshots.py        needs Debian's chromium, the package playwright, and a Chinese font
"""

import base64
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[1]
DEMO, FOLDER = ROOT / "docs" / "demo.html", ROOT / "docs" / "screenshots"
MOST_BYTES = 150_000
# The pixels of a picture, red, green, blue, alpha: the browser is the decoder.
DECODE = """async (url) => {
    const image = new Image();
    image.src = url;
    await image.decode();
    const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
    context.drawImage(image, 0, 0);
    const bytes = context.getImageData(0, 0, image.width, image.height).data;
    const text = Array.from({length: bytes.length / 4096 + 1}, (_, i) =>
        String.fromCharCode(...bytes.subarray(i * 4096, (i + 1) * 4096)));
    return [image.width, image.height, btoa(text.join(""))];
}"""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 780}

# A picture's name, the size of the window, and what the page's address says behind `#`.
PICTURES = [
    ("blocks-en-light", DESKTOP, "view=blocks&lang=en&theme=light&step=15"),
    ("blocks-zh-dark", DESKTOP, "view=blocks&lang=zh&theme=dark&step=15"),
    ("scheduler-en-dark", DESKTOP, "view=scheduler&lang=en&theme=dark&step=86"),
    ("attention-en-light", DESKTOP, "view=attention&lang=en&theme=light&step=131"),
    ("parallel-zh-light", DESKTOP, "view=parallel&lang=zh&theme=light&step=15"),
    ("phone-en-light", PHONE, "view=blocks&lang=en&theme=light&step=15"),
    ("phone-zh-dark", PHONE, "view=scheduler&lang=zh&theme=dark&step=86"),
]


def take(browser: Browser, name: str, size: dict[str, int], address: str) -> None:
    """Write one picture. Raises ValueError if it is larger than a repository likes."""
    page = browser.new_page(viewport=size)
    page.goto(f"{DEMO.as_uri()}#{address}")
    page.wait_for_selector("#stat-step")
    page.wait_for_timeout(250)
    url = "data:image/png;base64," + base64.b64encode(page.screenshot()).decode()
    width, height, pixels = page.evaluate(DECODE, url)
    page.close()
    png = with_palette(np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(height, width, 4)[:, :, :3])
    if len(png) > MOST_BYTES:
        raise ValueError(f"{name} has {len(png)} bytes: at most {MOST_BYTES} are allowed")
    (FOLDER / f"{name}.png").write_bytes(png)


def with_palette(pixels: np.ndarray) -> bytes:
    """A PNG of `pixels [height, width, 3]` with the 256 commonest colors: a page has few, and it takes a third."""
    height, width, _ = pixels.shape
    coarse, index, counts = np.unique(pixels.reshape(-1, 3) & 0xFC, axis=0, return_inverse=True, return_counts=True)
    palette = coarse[np.argsort(-counts)[:256]].astype(np.int32)
    nearest = np.abs(coarse.astype(np.int32)[:, None] - palette).sum(axis=2).argmin(axis=1).astype(np.uint8)
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter, which is none
    rows[:, 1:] = nearest[index.reshape(height, width)]
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    colors = (palette | palette >> 6).astype(np.uint8).tobytes()
    parts = [(b"IHDR", header), (b"PLTE", colors), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


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
