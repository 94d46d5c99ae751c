"""Whether tensors are numbers in memory: what may be read from Python and worked on by compiled loops."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def in_graph() -> bool:
    """Whether a graph is made of what runs, which is to serve other lengths, too."""
    return torch.compiler.is_compiling() or bool(torch._C._is_tracing())


def obstacle(*tensors: Tensor) -> str | None:
    """Why the numbers of some tensors cannot be read, or would be lost to whoever follows them; None if they can.

    Args:
        tensors: Of one call.

    Returns:
        Half a sentence, of which the call is the subject.
    """
    if in_graph():
        return "the call is part of a compiled graph"
    # Anything else than plain tensors (functorch's, fake ones) has no memory that a kernel could read.
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors) or _within_transform():
        return "the call is part of a transform"
    return None


def _within_transform() -> bool:
    """Whether torch.func, forward-mode differentiation or make_fx follows what is computed."""
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or proxies is not None
    )
