"""Writes docs/objectives/*.md, docs/advantages.md and their pictures from the source: `python docs/generate`.

--text-only     the Markdown alone
--into FOLDER   there instead of docs/
"""

from __future__ import annotations

import argparse
from pathlib import Path

import advantages_page
import objective_pages

from repo_ops.objectives import objective_names


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pages of objectives and advantages from their source.")
    parser.add_argument("--text-only", action="store_true", help="leave the pictures as they are")
    parser.add_argument("--into", type=Path, default=Path(__file__).resolve().parents[1], help="folder to write to")
    given = parser.parse_args()
    pages = {f"objectives/{name}.md": objective_pages.page(name) for name in objective_names()}
    pages |= {"objectives/README.md": objective_pages.index(), "advantages.md": advantages_page.page()}
    for path, text in pages.items():
        target = given.into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    if not given.text_only:
        import pictures  # matplotlib is wanted for nothing else

        made = {name: objective_pages.made(name) for name in objective_names()}
        pictures.draw(made, objective_pages.sections(), given.into / "objectives")


if __name__ == "__main__":
    main()
