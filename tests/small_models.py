"""Configurations of small models, and sentences of the few words that they know."""

from __future__ import annotations

import random

WORDS = ["the", "a", "film", "movie", "plot", "was", "is", "very", "good", "great", "awful", "bad", "dull"]
WORDS += ["and", "but", "not"]


def tiny_config(kind: str):
    """A configuration of two layers, four heads, width 32."""
    from transformers import BertConfig, DistilBertConfig, RobertaConfig

    vocabulary = 5 + len(WORDS)
    if kind == "distilbert":
        return DistilBertConfig(
            dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=vocabulary, max_position_embeddings=160
        )
    config = {"bert": BertConfig, "roberta": RobertaConfig}[kind]
    return config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=vocabulary,
        max_position_embeddings=160,
    )


def sentence_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences of the small vocabulary whose class follows from one word, with some noise in length."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        positive = number % 2 == 0
        words = draw.choices(WORDS[:8] + WORDS[-3:], k=draw.randint(3, 18))
        words.insert(draw.randrange(len(words)), draw.choice(WORDS[8:10] if positive else WORDS[10:13]))
        rows.append((f"{' '.join(words)}", "positive" if positive else "negative"))
    return rows
