"""The colours of pages and pictures, once for a light and once for a dark ground, and the CSS that states them.

Series are Okabe and Ito's palette, told apart by all common kinds of colour vision, darkened or lightened
until each stands out from its ground by 3 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "ink": "#1b1b1f",
    "soft": "#565663",
    "paper": "#fcfcfd",
    "card": "#f1f3f8",
    "line": "#d9d9e0",
    "accent": "#0b5cad",
    "band": "#e4ebf5",
    "series-1": "#0072b2",
    "series-2": "#d55e00",
    "series-3": "#008f68",
    "series-4": "#b8558f",
    "series-5": "#a87400",
    "series-6": "#2a8bc4",
    "series-7": "#6e6e6e",
    "series-8": "#857b00",
    "heat-low": "#f6f9fd",
    "heat-middle": "#4a90c4",
    "heat-high": "#08306b",
    "removed": "#c9c2b8",
}
DARK: Mapping[str, str] = {
    "ink": "#ececf1",
    "soft": "#b4b4c0",
    "paper": "#17181c",
    "card": "#22242b",
    "line": "#3a3b44",
    "accent": "#7db8f5",
    "band": "#262c38",
    "series-1": "#56a9e6",
    "series-2": "#ff8f52",
    "series-3": "#2cc79c",
    "series-4": "#e39ac5",
    "series-5": "#efb73e",
    "series-6": "#8fd0f5",
    "series-7": "#a8a8a8",
    "series-8": "#d3c84c",
    "heat-low": "#1c2027",
    "heat-middle": "#3d86bd",
    "heat-high": "#e2f3ff",
    "removed": "#57524c",
}
SERIES = tuple(name for name in LIGHT if name.startswith("series-"))


def page_css() -> str:
    """Custom properties for a page: the system's choice, or the reader's own; paper is always light."""
    dark = _properties(DARK) + " color-scheme: dark;"
    return (
        f":root {{ {_properties(LIGHT)} color-scheme: light; }}\n"
        f'@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {dark} }} }}\n'
        f'@media screen {{ :root[data-theme="dark"] {{ {dark} }} }}\n'
    )


def picture_css() -> str:
    """The same for a picture that stands alone, with a ground of its own."""
    return (
        f"svg {{ {_properties(LIGHT)} background: var(--paper); }} "
        f"@media screen and (prefers-color-scheme: dark) {{ svg {{ {_properties(DARK)} }} }}"
    )


def _properties(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
