"""Lay out the pages of the site: `python docs/site_pages.py FOLDER`, which `make docs` does before it builds.

The pages of docs/ and those of the top folder stand beside each other there. What only a Git host understands is put
otherwise.
"""

import re
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PROJECT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")  # of the site, but not of docs/


def anchor(heading: str) -> str:
    """The anchor of a heading as Git hosts make it; the site's are the same by zensical.toml."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def lay_out(folder: Path) -> None:
    """Write the pages to `folder`, anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in [*DOCS.glob("*.md"), *(DOCS.parent / name for name in PROJECT_PAGES)]:
        text = path.read_text(encoding="utf-8").replace("](../", "](").replace("](docs/", "](")
        text = re.sub(r"^```(\w+) no-run$", r"```\1", text, flags=re.MULTILINE)
        text = re.sub(r"^\|.*", lambda row: re.sub("`[^`]*`", _plain_bars, row[0]), text, flags=re.MULTILINE)
        name = "index.md" if path.name == "README.md" else path.name
        (folder / name).write_text(text.replace("](README.md", "](index.md"), encoding="utf-8")
    for path in [*DOCS.glob("*.svg"), *DOCS.glob("*.css"), *DOCS.glob("*.ipynb")]:
        shutil.copy(path, folder)


def _plain_bars(code: re.Match[str]) -> str:
    """Code in a table: a Git host wants its bars escaped, the site shows the backslash."""
    return code[0].replace(r"\|", "|")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
