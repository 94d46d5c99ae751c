"""The Trainer's side: realised sparsity in the logs, random draws tied to the global step."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from crisp_attention.huggingface.model import monitor, set_forward_index
from crisp_attention.monitoring import SparsityMonitor


class SparsityCallback(TrainerCallback):
    """Log realised sparsity as `realised_sparsity`, over the steps since the last log.

    Also ties the draws of a randomised rule to the trainer's global step, so that a resumed run
    repeats none.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._monitor: SparsityMonitor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting."""
        self._monitor = self._stack.enter_context(monitor(kwargs["model"]))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tie the next draw to the global step."""
        model: PreTrainedModel = kwargs["model"]
        set_forward_index(model, state.global_step * args.gradient_accumulation_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what was realised since the last log, in training, to the logged values."""
        if self._monitor is None or logs is None or "loss" not in logs:
            return
        realised = self._monitor.mean(training=True)
        self._monitor.reset()
        if realised is not None:
            logs["realised_sparsity"] = realised
            if state.log_history:
                state.log_history[-1]["realised_sparsity"] = realised

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting."""
        self._stack.close()
        self._monitor = None
