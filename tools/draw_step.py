"""Draws docs/step.svg: a step's way from `LLM.generate` to the token in its row, and the overlap of host and device.

    python tools/draw_step.py

The script builds the SVG as a string, without a library. It raises if boxes overlap or a text is wider than its box.
"""

from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path

TARGET = Path(__file__).parents[1] / "docs" / "step.svg"
WIDTH, HEIGHT = 980, 760
CHARACTER = 0.6  # a character's width in font sizes: an upper bound for sans-serif text of mixed letters
INK, MUTED, LINE = "#1f2933", "#52606d", "#7b8794"
PAPER, HOST, DEVICE, DATA = "#ffffff", "#e3f0ff", "#e6f6ec", "#fff3d6"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle with a part's title, what the part does, and the file to read. Coordinates are pixels."""

    x: int
    y: int
    width: int
    height: int
    fill: str
    title: str
    text: str = ""
    file: str = ""

    @property
    def right(self) -> int:
        return self.x + self.width

    @property
    def bottom(self) -> int:
        return self.y + self.height

    @property
    def middle(self) -> int:
        return self.x + self.width // 2

    def lines(self) -> list[tuple[str, int, str, str]]:
        """(text, font size, color, weight) of each line, from the top."""
        rows = [
            (self.title, 14, INK, "bold"),
            (self.text, 12, INK, "normal"),
            (self.file, 11, MUTED, "normal"),
        ]
        return [row for row in rows if row[0]]

    def overlaps(self, other: "Box") -> bool:
        is_beside = self.right <= other.x or other.right <= self.x
        return not is_beside and not (self.bottom <= other.y or other.bottom <= self.y)


GENERATE = Box(30, 70, 260, 62, HOST, "LLM.generate", "prompts in, completions out", "llm.py")
TEXT = Box(30, 162, 260, 62, HOST, "TextEngine", "text to ids, and ids back to text", "engine/text_engine.py")
SCHEDULER = Box(30, 254, 260, 62, HOST, "Scheduler", "which sequences run, how many tokens", "engine/scheduler.py")
BLOCKS = Box(320, 254, 180, 62, HOST, "BlockManager", "gives them blocks", "engine/block_manager.py")
PLAN = Box(30, 346, 260, 62, DATA, "StepPlan", "plain data: only what changed", "step_plan.py")
LAUNCH = Box(30, 438, 260, 62, HOST, "ModelRunner.launch", "launches, and returns at once", "worker/model_runner.py")
READ = Box(320, 70, 180, 62, HOST, "LLMEngine.step", "reads tokens of N−1", "engine/llm_engine.py")

ROWS = Box(560, 70, 390, 62, DATA, "rows", "token ids, block table, length of each sequence", "worker/input_batch.py")
PREPARE = Box(560, 156, 390, 48, DEVICE, "prepare_inputs", "ids, positions, slots, lengths out of the rows")
QKV = Box(580, 254, 110, 48, DEVICE, "QKV", "column-parallel")
ATTENTION = Box(714, 254, 216, 48, DEVICE, "attention", "stores K and V, reads blocks")
OUTPUT = Box(580, 326, 150, 48, DEVICE, "o_proj", "gives a PartialSum")
NORM = Box(754, 326, 176, 48, DEVICE, "norm", "reduces, adds, norms")
MLP = Box(580, 398, 350, 48, DEVICE, "MLP, norm", "gate and up, down: a PartialSum again")
HEAD = Box(560, 484, 185, 48, DEVICE, "LM head", "logits")
SAMPLER = Box(765, 484, 185, 48, DEVICE, "sampler", "draws a token a row")
BOXES = [GENERATE, TEXT, SCHEDULER, BLOCKS, PLAN, LAUNCH, READ, ROWS, PREPARE, QKV, ATTENTION, OUTPUT, NORM, MLP, HEAD]
BOXES.append(SAMPLER)

LAYERS = Box(560, 224, 390, 236, "none", "")  # the frame around a layer's boxes

# The overlap: (start, length, label) on two tracks, over one axis of time.
TRACK_X, TRACK_WIDTH, HOST_Y, DEVICE_Y, BAR = 110, 840, 620, 676, 36
HOST_BARS = [(0, 130, "plan, launch N"), (160, 120, "read N−1"), (290, 150, "plan, launch N+1"), (560, 120, "read N")]
HOST_BARS.append((690, 150, "plan, launch N+2"))
DEVICE_BARS = [(0, 140, "step N−1"), (142, 398, "step N"), (542, 298, "step N+1")]


def check() -> None:
    """Check the layout. Raises ValueError if boxes overlap, leave the picture, or are too narrow for their text."""
    bars = [*_bars(HOST_BARS, HOST_Y, HOST), *_bars(DEVICE_BARS, DEVICE_Y, DEVICE)]
    for box in [*BOXES, *bars]:
        if box.x < 0 or box.y < 0 or box.right > WIDTH or box.bottom > HEIGHT:
            raise ValueError(f"{box.title!r} leaves the picture")
        for text, size, _, _ in box.lines():
            if len(text) * size * CHARACTER > box.width:
                raise ValueError(f"{text!r} is too wide for its box of {box.width}")
    for one, other in combinations([*BOXES, *bars], 2):
        if one.overlaps(other):
            raise ValueError(f"{one.title!r} and {other.title!r} overlap")


def draw() -> str:
    """Draw the picture as SVG. Raises as `check`."""
    check()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">',
        "<title>A step's way: the host plans step N+1 while the device runs step N</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 Z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
        _text(30, 44, "Host: decisions, in plain Python", 16, INK, "bold"),
        _text(560, 44, "Device: nothing here waits for the host", 16, INK, "bold"),
        f'<line x1="542" y1="24" x2="542" y2="{LAUNCH.bottom + 32}" stroke="{LINE}" stroke-dasharray="3 5"/>',
        f'<rect x="{LAYERS.x}" y="{LAYERS.y}" width="{LAYERS.width}" height="{LAYERS.height}" rx="8" fill="none" '
        f'stroke="{LINE}" stroke-dasharray="6 4"/>',
        _text(LAYERS.right - 20, LAYERS.y + 20, "each layer (layers/, models/blocks.py)", 12, MUTED, anchor="end"),
    ]
    parts += [_box(box) for box in BOXES]
    parts += [
        *(_arrow((a.middle, a.bottom), (b.middle, b.y)) for a, b in _pairs(GENERATE, TEXT, SCHEDULER, PLAN, LAUNCH)),
        _arrow((SCHEDULER.right, 276), (BLOCKS.x, 276)),
        _arrow((BLOCKS.x, 294), (SCHEDULER.right, 294)),
        _arrow((LAUNCH.right, 469), (526, 469), (526, 101), (ROWS.x, 101)),
        _text(306, 460, "changes of the rows, once a step", 12, MUTED),
        _arrow((ROWS.middle, ROWS.bottom), (PREPARE.middle, PREPARE.y)),
        _arrow((QKV.middle, PREPARE.bottom), (QKV.middle, QKV.y)),
        _arrow((QKV.right, 278), (ATTENTION.x, 278)),
        _arrow((ATTENTION.x + 60, ATTENTION.bottom), (ATTENTION.x + 60, 314), (655, 314), (655, OUTPUT.y)),
        _arrow((OUTPUT.right, 350), (NORM.x, 350)),
        _arrow((NORM.middle, NORM.bottom), (NORM.middle, MLP.y)),
        _arrow((HEAD.middle, MLP.bottom), (HEAD.middle, HEAD.y)),
        _arrow((HEAD.right, 508), (SAMPLER.x, 508)),
        _arrow((SAMPLER.right, 508), (966, 508), (966, 101), (ROWS.right, 101)),
        _text(962, 552, "token back into its row", 12, MUTED, anchor="end"),
        _arrow((785, SAMPLER.bottom), (785, 566), (512, 566), (512, 101), (READ.right, 101)),
        _text(560, 556, "and to the host, one step later", 12, MUTED),
        _arrow((READ.middle, READ.bottom), (READ.middle, 193), (TEXT.right, 193)),
        _text(30, 606, "Overlap: the host plans N+1 while the device runs N", 16, INK, "bold"),
        _text(30, HOST_Y + 23, "host", 13, INK),
        _text(30, DEVICE_Y + 23, "device", 13, INK),
    ]
    parts += [_box(bar, size=12) for bar in _bars(HOST_BARS, HOST_Y, HOST)]
    parts += [_box(bar, size=12) for bar in _bars(DEVICE_BARS, DEVICE_Y, DEVICE)]
    parts += [
        _arrow((TRACK_X, 730), (TRACK_X + TRACK_WIDTH, 730)),
        _text(TRACK_X + TRACK_WIDTH, 748, "time", 12, MUTED, anchor="end"),
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _pairs(*boxes: Box) -> list[tuple[Box, Box]]:
    return list(zip(boxes, boxes[1:], strict=False))


def _bars(bars: list[tuple[int, int, str]], y: int, fill: str) -> list[Box]:
    return [Box(TRACK_X + start, y, length, BAR, fill, label) for start, length, label in bars]


def _box(box: Box, size: int = 0) -> str:
    lines = box.lines()
    step = 18
    top = box.y + (box.height - step * (len(lines) - 1)) / 2 + 5
    parts = [
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="6" fill="{box.fill}" '
        f'stroke="{LINE}"/>'
    ]
    for i, (text, own, color, weight) in enumerate(lines):
        parts.append(_text(box.middle, top + i * step, text, size or own, color, weight, "middle"))
    return "\n".join(parts)


def _text(x: float, y: float, text: str, size: int, color: str, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(text, quote=False)}</text>"
    )


def _arrow(*points: tuple[int, int]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
