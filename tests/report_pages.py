"""Reports of made-up records as tests read them."""

from __future__ import annotations

import html.parser

from crisp_attention.experiment import report
from crisp_attention.experiment.conclusions.analysis import analyse
from record_builders import (
    draws,
)

ACCURACY = {"dense": 0.8, "topk-50": 0.85, "percentile-80": 0.5, "dense-again": 0.8}
EVEN = draws(ACCURACY)
FIGURES = ["accuracy", "by-sparsity", "calibration", "contrasts", "curves", "gap", "sparsity"]
SCRIPT = "<script>alert(1)</script>"


def write(store):
    page = report.write(analyse(store), store.folder)
    return page.read_text(encoding="utf-8"), (store.folder / "report.md").read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page; fails where tags do not balance."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.attributes, self.text, self.declarations = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_decl(self, decl):
        self.declarations.append(decl)

    def handle_pi(self, data):
        self.declarations.append(data)

    def handle_data(self, data):
        self.text.append(data)
