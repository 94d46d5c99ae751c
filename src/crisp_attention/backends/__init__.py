"""How attention is computed. No backend imports another; `reference` is the specification.

A backend is a module with two functions: `refusal` says why it cannot serve a call (None if it can), and
`attention` serves it. One that is asked for by name serves or refuses; only "auto" chooses.
"""

from __future__ import annotations

from crisp_attention.backends.call import Call, Computed, Detail, Dropout, draw_dropout
from crisp_attention.backends.choice import BACKENDS, Choice, choose, require_known

__all__ = [
    "BACKENDS",
    "Call",
    "Choice",
    "Computed",
    "Detail",
    "Dropout",
    "choose",
    "draw_dropout",
    "require_known",
]
