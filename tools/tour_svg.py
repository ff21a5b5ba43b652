"""A sheet on which the tour's pictures are drawn, as SVG, in English or Chinese. It refuses what would leave it."""

from dataclasses import dataclass, field
from html import escape
from unicodedata import east_asian_width

INK, MUTED, LINE, PAPER, EMPTY = "#1f2933", "#52606d", "#7b8794", "#ffffff", "#e3e8ec"
COLORS = ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#edc948", "#76b7b2", "#9c755f", "#ff9da7"]
RED = "#c62828"

Words = str | tuple[str, str]  # the same in both languages, or (English, Chinese)


@dataclass(slots=True)
class Sheet:
    """A picture that grows by what is drawn. Coordinates are pixels from the top left.

    `language` is "en" or "zh": which of two words `text` writes.
    """

    width: int
    height: int
    language: str
    title: Words
    parts: list[str] = field(default_factory=list)

    def say(self, words: Words) -> str:
        """The words in the sheet's language."""
        return words if isinstance(words, str) else words[("en", "zh").index(self.language)]

    def text(
        self,
        x: float,
        y: float,
        words: Words,
        size: int = 13,
        color: str = INK,
        bold: bool = False,
        anchor: str = "start",
    ) -> None:
        """Write a line whose baseline is at y. Raises ValueError if it may leave the sheet."""
        text = self.say(words)
        width = sum(size * (1.0 if east_asian_width(c) in "WF" else 0.56) for c in text)
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        if left < -1 or left + width > self.width + 1 or not 0 < y <= self.height:
            raise ValueError(f"{text!r} at ({x:g}, {y:g}) leaves the sheet of {self.width} x {self.height}")
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{weight} text-anchor="{anchor}">'
            f"{escape(text, quote=False)}</text>"
        )

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = EMPTY,
        stroke: str = "",
        opacity: float = 1,
        radius: float = 0,
    ) -> None:
        """Raises ValueError if it leaves the sheet."""
        if x < 0 or y < 0 or x + width > self.width + 0.5 or y + height > self.height + 0.5:
            raise ValueError(f"a box at ({x:g}, {y:g}) of {width:g} x {height:g} leaves the sheet")
        extra = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
        extra += (f' stroke="{stroke}"' if stroke else "") + (f' rx="{radius:g}"' if radius else "")
        self.parts.append(
            f'<rect x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" fill="{fill}"{extra}/>'
        )

    def line(self, *points: tuple[float, float], color: str = LINE, tip: bool = False, dashed: bool = False) -> None:
        """A line through points, with an arrow's tip at the last if asked for."""
        path = " ".join(f"{x:.4g},{y:.4g}" for x, y in points)
        extra = (' marker-end="url(#tip)"' if tip else "") + (' stroke-dasharray="4 4"' if dashed else "")
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"{extra}/>')

    def svg(self) -> str:
        """The whole picture."""
        fonts = "Helvetica, Arial, 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif"
        head = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="{fonts}" role="img">',
            f"<title>{escape(self.say(self.title), quote=False)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 Z" fill="{LINE}"/></marker></defs>',
            f'<rect width="{self.width}" height="{self.height}" fill="{PAPER}"/>',
        ]
        return "\n".join([*head, *self.parts, "</svg>"]) + "\n"
