"""mkdocs' hook: pages that are written for a code host read well as a site, whose first page leads to the tour."""

import re
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

FIRST_PAGE = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=tour/index.html">\n'
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
LIST_AFTER_TEXT = re.compile(r"^([^\s|#<>\-*`\d].*)\n(?=(?:- |1\. ))", re.MULTILINE)


def on_config(config: Any, **_: Any) -> Any:
    """The site's configuration with a column that is wide enough for the code."""
    config["extra_css"].append("tour/site.css")
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page as mkdocs needs it.

    A link to a file outside docs/, as a source file, becomes its text, since the site has no such file. Markdown inside
    `<details>` is read, and a list may follow a line of text at once.
    """

    def keep_inside(match: re.Match[str]) -> str:
        is_inside = "://" in match[2] or not normpath(join(dirname(page.file.src_uri), match[2])).startswith("..")
        return match[0] if is_inside else match[1]

    markdown = LINK.sub(keep_inside, markdown).replace("<details>", '<details markdown="1">')
    return LIST_AFTER_TEXT.sub(r"\1\n\n", markdown)


def on_post_build(config: Any, **_: Any) -> None:
    """Write the page that the site begins with."""
    Path(config["site_dir"], "index.html").write_text(FIRST_PAGE, encoding="utf-8")
