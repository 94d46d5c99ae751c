"""Commands about one model. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from crisp_attention.cli.application import command
from crisp_attention.cli.options import Model
from crisp_attention.traits import RULES


@command
def check(
    model: Model,
    sparsity: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of scores to remove, in [0, 1) (default: the rule's own)."),
    ] = None,
    rule: Annotated[str, typer.Option(metavar="RULE", help=f"Which scores survive: {', '.join(RULES)}.")] = "topk",
) -> None:
    """Is a model served correctly, does sparsity reach every layer, and what does it realise?

    First each layer under the rule asked for, then the audit: every promise, measured on a copy.

    The audit is of the model, not of the rule: it is made with rule topk whichever is asked for.

    Exit code 0: served, with or without limits. 1: the audit finds something wrong. 2: it cannot be made sparse.

    Examples:
      crisp check minilm-l6
      crisp check minilm-l6 --rule percentile --sparsity 0.9
    """
    from crisp_attention.config import SparsityConfig

    config = SparsityConfig(sparsity=sparsity, rule=rule)
    from crisp_attention.experiment.training.model import load, resolve

    console = Console(stderr=True)
    checkpoint = resolve(model, lambda message: console.print(message, style="dim", markup=False, highlight=False))
    from transformers import AutoModel

    from crisp_attention.experiment.display import show_audit
    from crisp_attention.huggingface.audit import audit
    from crisp_attention.huggingface.model import check as probe
    from crisp_attention.huggingface.model import sparsify
    from crisp_attention.huggingface.quiet import silence

    silence()
    network = load(checkpoint, AutoModel, use_safetensors=True)
    report = audit(network)
    if report.checks:
        if report.served:
            typer.echo(str(probe(sparsify(network, config))))
        show_audit(Console(), report)
    else:
        sparsify(network, config)  # raises with the reason
    if not report.served:
        raise typer.Exit(1)


@command
def inspect(
    model: Model,
    text: Annotated[str, typer.Argument(help="What the model reads, in quotes.", show_default=False)],
    pair: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A second text, for models of sentence pairs.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help=f"Which scores survive (default: as the model was saved, else topk): {', '.join(RULES)}.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of scores removed at first, in [0, 1); the page's slider moves it."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("attention.html"),
) -> None:
    """Write an interactive page of a model's attention to one text: every head, dense beside sparse.

    One file that needs no network.

    Examples:
      crisp inspect minilm-l6 "a sentence" --rule percentile
      crisp inspect minilm-l6 "One." --pair "Another."
    """
    from crisp_attention.experiment.inspection import inspect as look
    from crisp_attention.experiment.report.attention import render_attention
    from crisp_attention.experiment.training.model import resolve

    console = Console(stderr=True)
    checkpoint = resolve(model, lambda message: console.print(message, style="dim", markup=False, highlight=False))
    out.write_text(render_attention(look(checkpoint, text, pair, rule, sparsity)), encoding="utf-8")
    Console().print(f"Attention page: {out}", markup=False, highlight=False, soft_wrap=True)
