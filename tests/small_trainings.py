"""The Trainer on a few made-up rows, and what its callbacks see."""

from __future__ import annotations

import gc

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import crisp_attention as crisp
from crisp_attention.state import layers

CUBIC = {"kind": "cubic", "end": 0.5}

# Each training collects garbage, which takes longer than these small ones, all of it for imported modules.
gc.freeze()


def rows(count=32, length=12):
    draw = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(5, 20, (length,), generator=draw), "labels": torch.tensor(number % 2)}
        for number in range(count)
    ]


def trainer(model, folder, steps=4, callbacks=None, examples=None, kind=Trainer, **changes):
    arguments = TrainingArguments(
        output_dir=str(folder), **{
            "max_steps": steps, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [],
            "save_strategy": "no", "disable_tqdm": True, **changes,
        },
    )  # fmt: skip
    callbacks = [crisp.SparsityCallback()] if callbacks is None else callbacks
    return kind(
        model=model, args=arguments, train_dataset=examples or rows(), eval_dataset=rows(8), callbacks=callbacks
    )


def shared(model):
    return next(iter(layers(model).values())).model


def now(model, training=True):
    """The sparsity of each layer at this moment."""
    return [state.sparsity(state.active(training) or state.config, training) for state in layers(model).values()]


def logged(run, key):
    return [entry[key] for entry in run.state.log_history if "loss" in entry and key in entry]


class Spy(TrainerCallback):
    """Notes what other callbacks see."""

    def __init__(self):
        self.logs, self.seen = [], {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def note(self, event, state, model):
        self.seen.setdefault(event, []).append((state.global_step, shared(model).progress))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.note("begin", state, model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.note("evaluate", state, model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self.note("save", state, model)
