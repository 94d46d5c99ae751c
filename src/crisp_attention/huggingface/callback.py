"""The Trainer's side: schedules and random draws tied to the global step, sparsity and entropy in the logs."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Sized
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import IntervalStrategy

from crisp_attention.huggingface.model import model_states, set_forward_index, set_progress
from crisp_attention.huggingface.recorder import StepRecorder, Tally, explain, summary
from crisp_attention.settings import require_share
from crisp_attention.state import ModelState, layers


class SparsityCallback(TrainerCallback, ExportableState):
    """Drive a model's sparsity schedule from the Trainer's global step, and log what it does.

    Progress is `global_step / max_steps`: a pure function of the step, so that a resumed run, gradient
    accumulation and several processes agree without any state. A training step sees the share that
    was done before it; an evaluation or a checkpoint after it, the share that is done then, so that
    a finished model stands at the end of its schedule. Where the Trainer stops early or takes up its
    best checkpoint again, the schedule stands where those weights were trained. The draws of rule
    'random' follow the global step in the same way.

    Each training log gets, over the steps since the one before:

    - `requested_sparsity`: the share of pairs that was to be removed, if the rule is told one;
    - `realised_sparsity`: the share that was removed;
    - `attention_entropy`: mean entropy of a query's attention in nats, of the step before the log.

    The model's settings go into each checkpoint's `trainer_state.json`. A training that is resumed from one with
    other settings warns.

    All are means over the pairs (queries) of the layers and heads that the settings make sparse, of
    this process's batches: nothing is exchanged between processes.

    Args:
        tolerance: Warn, once for each reason, where a layer's realised sparsity is further than this
            from the requested one; None never warns.
        watch_entropy: Whether to log entropy.

    Raises:
        ConfigurationError: If `tolerance` is not a share; when training begins, if the model is not
            sparsified.
    """

    def __init__(self, tolerance: float | None = 0.05, watch_entropy: bool = True) -> None:
        self.tolerance = None if tolerance is None else require_share("tolerance", tolerance)
        self.watch_entropy = watch_entropy
        self.settings: list[dict[str, Any]] = []
        self._recorders: list[tuple[ModelState, StepRecorder]] = []
        self._warned: set[str] = set()
        # An interrupted training calls no callback; what it left then goes with this object.
        weakref.finalize(self, _detach, self._recorders).atexit = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the arguments, and the settings of the model in training."""
        arguments = {"tolerance": self.tolerance, "watch_entropy": self.watch_entropy}
        return {"args": arguments, "attributes": {"settings": self.settings}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the sparse models and stand where training begins, or resumes."""
        self._recorders.clear()
        self._warned.clear()
        self.settings = [own.config.to_dict() for own in model_states(kwargs["model"])]
        self._compare_with_checkpoint(state)
        for own in model_states(kwargs["model"]):
            # Left by a training that was interrupted within a step.
            own.monitors[:] = [other for other in own.monitors if not isinstance(other, StepRecorder)]
            if args.logging_strategy != IntervalStrategy.NO:
                watched = (layer for layer in layers(kwargs["model"]).values() if layer.model is own)
                self._recorders.append((own, StepRecorder({layer.name: layer for layer in watched})))
        _come_first(self)
        _stand(kwargs["model"], state.global_step, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stand at the progress made so far, for all of the step's forwards, and count them."""
        _stand(kwargs["model"], state.global_step, state)
        set_forward_index(kwargs["model"], state.global_step * args.gradient_accumulation_steps)
        watch = self.watch_entropy and _log_follows(args, state, kwargs.get("train_dataloader"))
        for own, recorder in self._recorders:
            recorder.watch_entropy = watch
            if recorder not in own.monitors:
                own.monitors.append(recorder)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stand at the progress made now, for the evaluation or checkpoint that may follow."""
        _detach(self._recorders)
        _stand(kwargs["model"], state.global_step, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values since the last training log, and warn where they miss what was requested."""
        if logs is None or "loss" not in logs:
            return
        tallies = [tally for _, recorder in self._recorders for tally in recorder.read()]
        for _, recorder in self._recorders:
            recorder.reset()
        values = summary(tallies)
        logs.update(values)
        if state.log_history:  # a copy of `logs`, made before any callback is asked
            state.log_history[-1].update(values)
        if state.is_world_process_zero:
            self._warn(tallies, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stand where the weights that remain were trained, and let go of the schedule."""
        _detach(self._recorders)
        restored = args.load_best_model_at_end and state.best_model_checkpoint is not None
        _stand(kwargs["model"], (restored and state.best_global_step) or state.global_step, state)
        for own in model_states(kwargs["model"]):
            own.driven = False  # whoever trains it next has to

    def _compare_with_checkpoint(self, state: TrainerState) -> None:
        """Warn where training is resumed with other settings than it had."""
        callbacks = cast(dict[str, Any], state.stateful_callbacks or {})  # Transformers annotates what goes in
        kept = callbacks.get(type(self).__name__)
        before = kept["attributes"]["settings"] if isinstance(kept, dict) else []
        if state.global_step and before and before != self.settings:
            warnings.warn(
                f"Training is resumed at step {state.global_step} with other sparsity settings than it had: "
                f"{before} then, {self.settings} now.",
                stacklevel=2,
            )

    def _warn(self, tallies: list[Tally], step: int) -> None:
        if self.tolerance is None:
            return
        missed = [(abs(tally.realised - tally.requested), tally) for tally in tallies if tally.requested is not None]
        # The worst layer speaks for all that miss for the same reason.
        for distance, tally in sorted(missed, key=lambda pair: -pair[0]):
            if distance <= self.tolerance:
                break
            reason, sentence = explain(tally)
            if reason in self._warned:
                continue
            self._warned.add(reason)
            warnings.warn(
                f"Up to step {step}, {tally.layer} realised a sparsity of {tally.realised:.3f} where "
                f"{tally.requested:.3f} was requested. {sentence} SparsityCallback(tolerance=...) says how far off is "
                f"reported, {self.tolerance:g} now.",
                stacklevel=2,
            )


def _stand(model: Any, step: int, state: TrainerState) -> None:
    set_progress(model, min(step / max(state.max_steps, 1), 1.0))


def _detach(recorders: list[tuple[ModelState, StepRecorder]]) -> None:
    for own, recorder in recorders:
        if recorder in own.monitors:
            own.monitors.remove(recorder)


def _log_follows(args: TrainingArguments, state: TrainerState, loader: object) -> bool:
    """Whether the step that begins is the last one before a training log."""
    step = state.global_step + 1
    if args.logging_strategy == IntervalStrategy.EPOCH:
        if not isinstance(loader, Sized):
            return True  # nobody knows where the epoch ends
        steps = max(-(-len(loader) // args.gradient_accumulation_steps), 1)
        return step % steps == 0 or step == state.max_steps
    return step % max(int(state.logging_steps), 1) == 0 or (args.logging_first_step and step == 1)


def _come_first(callback: TrainerCallback) -> None:
    """Let a callback see events before those that report to TensorBoard and the like.

    The Trainer puts its reporters before the user's callbacks and gives these no way to reach them:
    values added to a log would come too late. So the handler is looked up among the callers.
    Without one, the values still reach `log_history` and the callbacks that come later.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and any(other is callback for other in handler.callbacks):
            handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
            return
        frame = frame.f_back
