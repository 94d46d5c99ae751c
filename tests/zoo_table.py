"""`docs/compatibility.md`: written from the audits of all architectures, and read back by the test."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import transformers

if TYPE_CHECKING:
    from zoo import Row

COLUMNS = ("=0", "share", "batch", "pad", "left", "causal", "cache", "window", "grad", "reload", "restore")
_KINDS = (
    "Text: encoders", "Text: decoders", "Text: encoder-decoders", "Images and video", "Sound", "Several senses",
    "Other",
)  # fmt: skip
_VERDICTS = ("served", "served with limits", "refused", "no attention", "not run")
_MARKS = {"+": "✓", "-": "✗", ".": "·"}

_HEAD = """# Compatibility

Every architecture of Transformers {version} that has a configuration class is listed. Those that could be built small
and random from that class were put through `crisp.audit`; of the others (*not run*) nothing is known. This page is
written by `python tests/zoo.py --write docs/compatibility.md` and compared with a fresh run by
`tests/huggingface/test_zoo.py`; nothing in it is claimed by hand. For your own model:

```console
$ crisp check MODEL
```

| verdict | architectures | what it means |
| --- | ---: | --- |
| served | {served} | every check that applies holds |
| served with limits | {limits} | the same, with what the last column says |
| refused | {refused} | `crisp.sparsify` raises, says why and leaves the model as it was |
| no attention | {none} | nothing to make sparse; `crisp.sparsify` raises |
| not run | {skipped} | no small model or no inputs for it could be made here: nothing is known of it |

## The checks

✓ holds, ✗ fails, · does not apply (mostly: the dense model itself does not hold it, as padding in models with
convolutions). Figures are compared in double precision where the model computes in it.

| column | what was measured |
| --- | --- |
| =0 | at sparsity 0, through the operator itself, outputs equal the stock model's, with and without masks |
| share | at 0.5 and 0.8 each layer removes as many pairs as asked for, removed pairs have no weight, outputs change |
| batch | an example alone gives what it gives in a batch |
| pad | seven more pads at the right change nothing |
| left | seven pads at the left change nothing |
| causal | later tokens never change earlier outputs |
| cache | decoding with a key-value cache gives what one pass gives |
| window | survivors lie inside the model's own windows |
| grad | all gradients are finite in training mode |
| reload | saved and loaded, it is as sparse as before, and never dense in silence |
| restore | `crisp.densify` gives the stock outputs to the bit and the configuration as it was |
"""


def page(rows: list[Row]) -> str:
    """The whole page."""
    counts = Counter(row.verdict for row in rows)
    served, limits, refused, none, skipped = (counts[verdict] for verdict in _VERDICTS)
    parts = [
        _HEAD.format(
            version=transformers.__version__, served=served, limits=limits, refused=refused, none=none, skipped=skipped
        )
    ]
    for kind in _KINDS:
        members = [row for row in rows if row.kind == kind and row.verdict.startswith("served")]
        if members:
            parts.append(f"\n## {kind}\n\n| architecture | class | verdict | {' | '.join(COLUMNS)} | limits |\n")
            parts.append(f"| --- | --- | --- | {' | '.join([':-:'] * len(COLUMNS))} | --- |\n")
            parts += [f"{line(row)}\n" for row in members]
    for verdict in _VERDICTS[2:]:
        members = [row for row in rows if row.verdict == verdict]
        if members:
            parts.append(f"\n## {verdict.capitalize()}\n\n| architecture | class | verdict | reason |\n")
            parts.append("| --- | --- | --- | --- |\n")
            parts += [f"{line(row)}\n" for row in members]
    return "".join(parts)


def line(row: Row) -> str:
    """The row of one architecture as the page has it."""
    cells = [f"`{row.model_type}`", row.model, row.verdict]
    if row.verdict.startswith("served"):
        cells += [_MARKS[letter] for letter in row.outcomes]
    return f"| {' | '.join([*cells, row.reason.replace('|', '/')])} |"


def read(text: str) -> tuple[str, dict[str, str]]:
    """The Transformers version of a page and its row of each architecture."""
    version = re.search(r"Transformers (\d\S*) that", text)
    found = {}
    for content in text.splitlines():
        name = re.match(r"\| `([^`]+)` \|", content)
        if name:
            found[name[1]] = content
    return version[1] if version else "", found
