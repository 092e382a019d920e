"""Draw docs/architecture.svg, the rooms of chimera/: `python docs/architecture_picture.py`."""

from html import escape
from pathlib import Path

PAGE = Path(__file__).with_name("architecture.svg")
WIDTH, HEIGHT, GAP, TALL = 920, 400, 14, 62
CONVERT = [  # room: what comes out of it
    ("read", "rows, from any position"),
    ("encode", "documents, their ids"),
    ("pack", "blocks, shards"),
    ("build", "parts, publication"),
    ("verify", "every byte checked"),
]
TRAIN = [
    ("order", "step → blocks"),
    ("data", "blocks of a step"),
    ("step", "batch → loss"),
    ("run", "Composer, resume"),
    ("history", "what a run did"),
    ("export", "the folder, proven"),
]
SHARED = "cli · config · files · objects · mds · manifest · text · retries · versions"
STYLE = """
text { font: 13px system-ui, "Segoe UI", Roboto, sans-serif; fill: #1c2024 }
.name { font-weight: 600; font-size: 15px }
.small { fill: #57606a; font-size: 11.5px }
.back { fill: #f7f8fa } .room { fill: #ffffff; stroke: #aab2bb }
.convert { stroke: #2166c4 } .train { stroke: #c65a11 } .store { fill: #14866d } .on { fill: #ffffff }
.arrow { stroke: #57606a; stroke-width: 1.5; fill: none } .head { fill: #57606a }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small { fill: #9da7b3 } .back { fill: #161b22 } .room { fill: #0d1117; stroke: #6e7681 }
.convert { stroke: #58a6ff } .train { stroke: #f0883e } .on { fill: #ffffff }
.arrow { stroke: #9da7b3 } .head { fill: #9da7b3 }
}
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, wide: float, tall: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{tall:g}" rx="6" class="{kind}"/>'


def arrow(x: float, y: float, end: float) -> str:
    """From (x, y) to the right, to `end`."""
    line = f'<path d="M{x:g} {y:g}H{end - 6:g}" class="arrow"/>'
    return f'{line}<path d="M{end:g} {y:g}l-7 -4v8z" class="head"/>'


def wing(rooms: list[tuple[str, str]], y: float, kind: str) -> list[str]:
    """A row of rooms with arrows between them."""
    wide = (WIDTH - 40 - GAP * (len(rooms) - 1)) / len(rooms)
    parts = []
    for i, (name, gives) in enumerate(rooms):
        x = 20 + i * (wide + GAP)
        parts += [box(x, y, wide, TALL, f"room {kind}"), text(x + wide / 2, y + 26, name, "name")]
        parts.append(text(x + wide / 2, y + 46, gives, "small"))
        if i + 1 < len(rooms):
            parts.append(arrow(x + wide, y + TALL / 2, x + wide + GAP))
    return parts


def page() -> str:
    """The whole picture; its colors follow the reader's, light or dark."""
    middle = WIDTH / 2
    parts = [box(0, 0, WIDTH, HEIGHT, "back")]
    parts.append(text(20, 30, "chimera/convert: sources to shards", "name", "start"))
    parts += wing(CONVERT, 44, "convert")
    parts += [f'<path d="M{middle:g} 108V130" class="arrow"/><path d="M{middle:g} 138l-4 -7h8z" class="head"/>']
    parts += [box(180, 140, WIDTH - 360, 44, "store"), text(middle, 159, "shards", "name on")]
    parts.append(text(middle, 176, "index.json, manifest.json: the one thing both wings know", "small on"))
    parts += [f'<path d="M{middle:g} 186V208" class="arrow"/><path d="M{middle:g} 216l-4 -7h8z" class="head"/>']
    parts.append(text(20, 232, "chimera/train: shards to a model", "name", "start"))
    parts += wing(TRAIN, 246, "train")
    parts += [box(20, 332, WIDTH - 40, 48, "room"), text(middle, 352, "chimera/: what both wings share", "name")]
    parts.append(text(middle, 371, SHARED, "small"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    title = "<title>The rooms of chimera, in the order the data flows</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
