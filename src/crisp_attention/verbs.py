"""The verbs whose way differs by where a model's attention lives: sparsify, densify, check.

`home_of` is the one place that decides. The other verbs (dense, monitor, set_progress,
set_forward_index) work on the state that every home hangs on its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from crisp_attention.checking import CheckReport, Inputs
from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, UnsupportedModelError
from crisp_attention.huggingface import model as transformers_model
from crisp_attention.modules import model as plain_model

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Home:
    """How a kind of model is made sparse.

    Attributes:
        sparsify: Model, configuration, then `inputs`, `backend`, `exclude` and settings by keyword; the model.
        densify: Model to the same model.
        check: Model and inputs to a report.
        excludes: Whether its sparsify takes `exclude`.
    """

    sparsify: Callable[..., Any]
    densify: Callable[..., Any]
    check: Callable[..., CheckReport]
    excludes: bool


TRANSFORMERS = Home(transformers_model.sparsify, transformers_model.densify, transformers_model.check, excludes=False)
PLAIN = Home(plain_model.sparsify, plain_model.densify, plain_model.check, excludes=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The model within DDP, `torch.compile` or a PEFT model; itself if nothing wraps it."""
    inner: Any = model
    while True:
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner  # type: ignore[no-any-return]


def home_of(model: nn.Module) -> Home:
    """The home of a model.

    Raises:
        UnsupportedModelError: If it is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"Expected a Transformers PreTrainedModel or a torch.nn.Module, got {type(model).__name__}."
        )
    return TRANSFORMERS if isinstance(model, PreTrainedModel) else PLAIN


def sparsify(
    model: Model,
    config: SparsityConfig | None = None,
    *,
    inputs: Inputs | None = None,
    exclude: Iterable[str] = (),
    backend: str = "auto",
    **settings: Any,
) -> Model:
    """Make every attention layer of a model sparse, in place.

    A Transformers model: the settings go into `model.config.crisp_attention`, so that
    `save_pretrained` keeps them, and a small forward pass (evaluation mode, no gradients, random
    state untouched) makes sure that each layer really calls the operator.

    Any other `nn.Module`: its `torch.nn.MultiheadAttention` (also within `nn.Transformer` and its
    layers), timm attention and `CrispAttention` layers become sparse, counted in the order in which
    they were added to the model. The settings go into its `state_dict`. A layer that looks like
    attention and would stay dense is an error.

    Calling it again replaces the settings.

    Args:
        model: A `PreTrainedModel` whose attention goes through Transformers' attention interface,
            or any other `nn.Module`; also within DDP, `torch.compile` or a PEFT model.
        config: The settings, or give them as keywords.
        inputs: Keyword arguments of a forward pass for the check; needed where a Transformers model
            takes other than token ids or images. A plain module is tried out only if they are given.
        exclude: Names of submodules of a plain module that stay dense, with all that they hold.
        backend: What computes sparse attention on this machine; it is not saved. "auto" takes the fastest that is
            installed and serves a call; a named one ("reference", "cpu", "triton") serves or raises. `check` tells
            which.
        **settings: Fields of `SparsityConfig`, in place of `config`.

    Returns:
        The same model.

    Raises:
        ConfigurationError: If a setting is invalid or the rule cannot serve this (causal) model.
        UnsupportedModelError: If the model, or one of its attention layers, would not be touched.
            The model is then as it was.
    """
    within = unwrap(model)
    home = home_of(within)
    if exclude and not home.excludes:
        raise ConfigurationError("exclude names parts of a plain module; for a Transformers model use layers=....")
    parts = {"exclude": exclude} if home.excludes else {}
    home.sparsify(within, config, inputs=inputs, backend=backend, **parts, **settings)
    return model


def densify(model: Model) -> Model:
    """Undo `sparsify`: dense attention as before, settings removed from the model.

    Returns:
        The same model.
    """
    within = unwrap(model)
    home_of(within).densify(within)
    return model


def check(model: nn.Module, inputs: Inputs | None = None) -> CheckReport:
    """Probe a sparsified model with a small batch.

    Runs forward passes in evaluation mode without gradients, as if sparse in every mode; modes and
    random state are put back. A model that was only loaded is made ready first, as `load` does. On
    short probes the realised sparsity differs from the requested one by rounding and `min_keep`.

    Args:
        model: A sparsified model.
        inputs: Keyword arguments of its forward pass; by default, for a Transformers model, a small
            batch with padding.

    Returns:
        Each layer's realised sparsity and the problems found, untouched layers by name.

    Raises:
        ConfigurationError: If the model is not sparsified.
        UnsupportedModelError: If no default inputs are known for the model, or one that was only
            loaded cannot be served.
    """
    within = unwrap(model)
    return home_of(within).check(within, inputs)
