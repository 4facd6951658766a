"""For mkdocs: what leaves docs/ is not on the site. A link to a source file becomes its text; pictures come along."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)\s]*)?\)")
_RESULT = re.compile(r"(!\[[^\]]*\]\()(?:\.\./)+benchmarks/results/([^)/]+\.png\))")


def on_files(files: Any, *, config: Any, **_: Any) -> Any:
    """The site's files, with the pictures of the benchmarks among them."""
    for picture in sorted((Path(config["docs_dir"]).parent / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"img/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page's text without links that would lead nowhere."""
    docs = Path(config["docs_dir"]).resolve()
    folder = (docs / page.file.src_uri).parent

    def keep(link: re.Match[str]) -> str:
        inside = (folder / link[2]).resolve().is_relative_to(docs)
        return link[0] if inside else link[1]

    up = "../" * page.file.src_uri.count("/")
    return _LINK.sub(keep, _RESULT.sub(rf"\g<1>{up}img/\g<2>", markdown))
