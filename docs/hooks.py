"""Brings files of the repository that pages link to (results, notebooks, examples) into the site.

A page links to them as they lie in a checkout, `../benchmarks/results/cpu/index.json`, so the links work there too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"benchmarks/results": "*", "notebooks": "*.ipynb", "examples": "*.py"}
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the folders' files, at the same paths below the site's root."""
    for folder, pattern in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob(pattern)):
            if path.is_file():
                name = path.relative_to(ROOT).as_posix()
                files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave `docs/` lead to the copies."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match[1]))
        return f"]({posixpath.relpath(target, folder or '.')}" if target.startswith(tuple(FOLDERS)) else match[0]

    return _LINK.sub(inside, markdown)
