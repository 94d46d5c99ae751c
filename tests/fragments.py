"""HTML fragments as notebooks get them, read strictly."""

from __future__ import annotations

from html.parser import HTMLParser


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "style", "link", "img", "iframe"), tag
        names = dict(attrs)
        assert not [name for name in names if name.startswith("on")], names
        assert "http" not in (names.get("style") or "")
        if tag == "a":
            self.links.append(names["href"])
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(fragment: str) -> _Reader:
    """A fragment's texts and links; fails if its tags do not balance, or anything in it is loaded or runs."""
    reader = _Reader()
    reader.feed(fragment)
    reader.close()
    assert not reader.open, reader.open
    return reader


def words(fragment: str) -> str:
    """What a reader sees."""
    return " ".join(" ".join(read(fragment).texts).split())
