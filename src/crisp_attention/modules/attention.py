"""`CrispAttention`: multi-head attention for layers of one's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.masks import read_pairs
from crisp_attention.modules.masks import require_servable
from crisp_attention.modules.sparse import SparseModule, active, in_words
from crisp_attention.operator import attend
from crisp_attention.settings import given
from crisp_attention.state import LayerState, ModelState, attach


class CrispAttention(SparseModule):
    """Multi-head attention over the surviving scores, with projections for queries, keys, values and output.

    A module made alone has settings of its own. `crisp_attention.sparsify` on the model that holds
    several gives them one set, tells each its place, and is what `layers`, `layer_sparsity`,
    staggered schedules and the rule `random` need. The other verbs work either way.

    Args:
        embed_dim: Width E of tokens; a multiple of `num_heads`.
        num_heads: Query heads H.
        num_kv_heads: Key/value heads, of which H is a multiple (grouped-query attention); H if None.
        dropout: Dropout on the attention weights in training.
        bias: Whether the projections have biases.
        config: The settings, or give them as keywords.
        **settings: Fields of `SparsityConfig`, in place of `config`.

    Raises:
        ConfigurationError: If a size or setting cannot be served.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        config: SparsityConfig | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(embed_dim, num_heads, kv_heads) < 1 or embed_dim % num_heads or num_heads % kv_heads:
            raise ConfigurationError(
                "embed_dim must be a multiple of num_heads, and num_heads of num_kv_heads, all at least 1; "
                f"got {embed_dim}, {num_heads}, {kv_heads}."
            )
        if not 0.0 <= dropout < 1.0:
            raise ConfigurationError(f"dropout must be in [0, 1), got {dropout!r}.")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        config = given(SparsityConfig, config, settings)
        _require_alone(config)
        require_heads("CrispAttention", num_heads, config)
        attach(self, LayerState("", 0, 1, ModelState(config)))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        query_valid: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend from x to itself, or to a context.

        Args:
            x: `[B, Q, E]`.
            context: `[B, K, E]`, another sequence to attend to (cross-attention).
            valid: Bool, True = may be attended: `[B, K]`, or broadcastable to `[B, H, Q, K]`.
            query_valid: Bool `[B, Q]`, True = not padding; follows from `valid` in self-attention.
            bias: Added to the scores, broadcastable to `[B, H, Q, K]`; -inf hides a pair.
            causal: Whether query i attends to keys up to i + K - Q only.

        Returns:
            `[B, Q, E]`.

        Raises:
            ConfigurationError: If a shape does not fit or the rule cannot serve this call.
        """
        source = x if context is None else context
        for name, tensor in (("x", x), ("context", source)):
            if tensor.dim() != 3 or tensor.shape[-1] != self.embed_dim or tensor.shape[0] != x.shape[0]:
                raise ConfigurationError(
                    f"{name} must be [B, N, E] with E = {self.embed_dim}, and as many rows in context as in x; "
                    f"got {list(tensor.shape)}."
                )
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k, v = (
            projection(source).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.k_proj, self.v_proj)
        )
        pairs, bias = read_pairs(
            (x.shape[0], self.num_heads, x.shape[1], source.shape[1]),
            x.device,
            valid=valid,
            query_valid=query_valid,
            bias=bias,
            causal=causal,
            cross=context is not None,
        )
        require_servable(active(self), pairs, causal=causal)
        dropout_p = self.dropout if self.training else 0.0
        layer = self.layer
        if layer is None:
            out = attend(q, k, v, config=None, pairs=pairs, bias=bias, dropout_p=dropout_p)
        else:
            out = layer.attend(q, k, v, training=self.training, pairs=pairs, bias=bias, dropout_p=dropout_p)
        output: Tensor = self.out_proj(out.output.transpose(1, 2).flatten(2))
        return output

    def extra_repr(self) -> str:
        """Sizes and settings."""
        heads = f"{self.num_heads} heads" + f" over {self.num_kv_heads}" * (self.num_kv_heads != self.num_heads)
        own = None if self.layer is None else self.layer.config
        return f"{self.embed_dim}, {heads}, dropout={self.dropout:g}, {in_words(own)}"


def require_heads(name: str, heads: int, config: SparsityConfig) -> None:
    """Refuse settings for heads that a layer does not have.

    Args:
        name: The layer, for the message.
        heads: How many it has.
        config: The settings.

    Raises:
        ConfigurationError: If `config.heads` names one that does not exist.
    """
    if config.heads is not None and max(config.heads) >= heads:
        raise ConfigurationError(
            f"heads={list(config.heads)} names {max(config.heads)}, but {name} has {heads} heads (0 to {heads - 1})."
        )


def _require_alone(config: SparsityConfig) -> None:
    reason = None
    if config.rule == "random":
        reason = "Rule 'random' draws by layer and step"
    elif config.layers is not None or config.layer_sparsity is not None:
        reason = "layers and layer_sparsity count the layers of a model"
    elif config.schedule is not None and config.schedule.stagger:
        reason = "A staggered schedule goes by a layer's place"
    if reason is not None:
        raise ConfigurationError(
            f"{reason}, which a module made alone does not know. Make it with other settings and call "
            "crisp_attention.sparsify(model, ...) on the whole model."
        )
