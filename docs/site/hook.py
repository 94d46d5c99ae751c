"""What the site's build adds to the pages: pictures, tables, results and the project's own documents.

A page asks for what is generated in a comment, `<!-- rule topk -->`, `<!-- scores -->`, `<!-- table finetuning -->`,
`<!-- figure quick contrasts -->` or `<!-- evidence -->`, which shows nowhere else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from evidence import FILE
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pictures import picture_of_rule, picture_of_scores
from tables import RESULTS, TABLES

from crisp_attention.experiment.report.theme import DARK, LIGHT

ROOT = Path(__file__).parents[2]
_DOCUMENTS = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_PUBLISHED = {".json", ".svg", ".html"}
_DIRECTIVE = re.compile(r"^<!-- (rule|scores|table|figure|evidence)\b *([^>]*?) *-->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the documents of the repository's root, the published results, and the colours of reports."""
    for source, page in _DOCUMENTS.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in _PUBLISHED and "records" not in path.parts:
            target = f"results/{path.relative_to(RESULTS).as_posix()}"
            files.append(File.generated(config, target, abs_src_path=str(path)))
    files.append(File.generated(config, "theme.css", content=_colours()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put what a page asks for in its place, and lead its links to where things lie in the site."""
    depth = page.file.src_uri.count("/")
    if page.file.src_uri in _DOCUMENTS.values():  # written in the root, one folder above the other pages
        markdown = re.sub(r"\]\(docs/", "](", markdown)
        for source, target in _DOCUMENTS.items():
            markdown = markdown.replace(f"]({source})", f"]({target})")
    else:
        # From a page of docs/, results/ is one folder further up than in the site.
        markdown = markdown.replace("](" + "../" * (depth + 1) + "results/", "](" + "../" * depth + "results/")
        # A folder is nothing to open in a site: its figures are on the page of benchmarks.
        markdown = re.sub(r"\]\((\.\./)*results/benchmarks/attention-cpu\)", "](benchmarks.md)", markdown)
    return _DIRECTIVE.sub(_generated, markdown)


def _generated(found: re.Match[str]) -> str:
    kind, arguments = found[1], found[2].split()
    try:
        if kind == "scores":
            return picture_of_scores()
        if kind == "rule":
            return picture_of_rule(*arguments)
        if kind == "table":
            return TABLES[arguments[0]]()
        if kind == "evidence":
            return _figure(FILE)
        study, name = arguments
        return _figure(RESULTS / study / "figures" / f"{name}.svg")
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise PluginError(f"{found[0]} cannot be made: {error!r}") from error


def _figure(file: Path) -> str:
    """A published picture, in the colours of the page around it."""
    svg = file.read_text(encoding="utf-8")
    return f'<figure class="report">{re.sub("<style>svg .*?</style>", "", svg, count=1, flags=re.DOTALL)}</figure>'


def _colours() -> str:
    """The colours of reports as custom properties, for the site's light and dark scheme."""
    schemes = (("default", LIGHT), ("slate", DARK))
    return "\n".join(
        f'[data-md-color-scheme="{scheme}"] {{ {" ".join(f"--{name}: {value};" for name, value in colours.items())} }}'
        for scheme, colours in schemes
    )
