"""What each of two gloo processes does in `test_ddp.py`, and what one process does with the whole batch.

Run as `python two_processes.py MODEL OUT` with the variables that torchrun sets; writes `OUT/rank-R.pt`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import crisp_attention as crisp
from crisp_attention.backends import Detail

PROCESSES, EXAMPLES = 2, 8
HALFWAY = {"kind": "linear"}
SETTINGS: dict[str, dict[str, Any]] = {
    "percentile": {"rule": "percentile", "sparsity": 0.8},
    "topk": {"rule": "topk", "sparsity": 0.8, "schedule": HALFWAY},
    "random": {"rule": "random", "sparsity": 0.5},
    "random matrix": {"rule": "random", "sparsity": 0.5, "scope": "matrix"},
}
TRAINED = {"rule": "random", "sparsity": 0.8, "schedule": {"kind": "cubic", "end": 0.5}}


class Watcher:
    """Keeps every keep mask."""

    detail = Detail.WEIGHTS

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []

    def record(self, layer: str, training: bool, out: Any) -> None:
        self.masks.append(out.keep.clone())


class Journal(TrainerCallback):
    """Notes the sparsity of each layer in each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, list[float]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append((state.global_step, sparsities(model)))


def load(folder: str) -> Any:
    """The model without dropout, in training mode."""
    return AutoModelForSequenceClassification.from_pretrained(
        folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).train()


def layers(model: Any) -> list[Any]:
    return [module._crisp_layer for module in model.modules() if hasattr(module, "_crisp_layer")]


def sparsities(model: Any) -> list[float]:
    return [layer.sparsity(layer.config, training=True) for layer in layers(model)]


def batch(part: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Eight sentences of different lengths."""
    ids = torch.randint(5, 20, (EXAMPLES, 16), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(16) < torch.arange(9, 9 + EXAMPLES)[:, None]).long()
    return {"input_ids": ids[part], "attention_mask": mask[part], "labels": (torch.arange(EXAMPLES) % 2)[part]}


def gradients(folder: str, settings: dict[str, Any], part: slice, wrap: Any) -> dict[str, Any]:
    """Of two forwards at progress 0.5: summed gradients, keep masks, sparsity."""
    model = wrap(crisp.sparsify(load(folder), **settings))
    crisp.set_progress(model, 0.5)
    watcher = Watcher()
    layers(model)[0].model.monitors.append(watcher)
    for _ in range(2):
        model(**batch(part)).loss.backward()
    return {
        "gradients": [parameter.grad for parameter in model.parameters()],
        "masks": watcher.masks,
        "sparsities": sparsities(model),
    }


def train(folder: str, out: Path, batch_size: int) -> dict[str, Any]:
    """Six steps of two accumulated batches with the Trainer; saves a checkpoint after the third."""
    draw = torch.Generator().manual_seed(1)
    examples = [
        {"input_ids": torch.randint(5, 20, (16,), generator=draw), "labels": number % 2} for number in range(96)
    ]
    journal = Journal()
    model = crisp.sparsify(load(folder), **TRAINED)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out), max_steps=6, per_device_train_batch_size=batch_size, gradient_accumulation_steps=2,
            logging_steps=1, save_strategy="steps", save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True,
            # SGD: Adam would make much of the last bits of gradients near zero.
            optim="sgd", learning_rate=0.1, average_tokens_across_devices=False, seed=5, dataloader_pin_memory=False,
            ddp_backend="gloo" if distributed.is_initialized() else None,
        ),
        train_dataset=examples,
        callbacks=[crisp.SparsityCallback(tolerance=None), journal],
    )  # fmt: skip
    trainer.train()
    return {
        "steps": journal.steps,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": model.state_dict(),
        "progress": model.config.crisp_attention["progress"],
        "monitors": len(layers(model)[0].model.monitors),
        "processes": trainer.args.world_size,
    }


def main(folder: str, out: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo")
    part = slice(rank * EXAMPLES // PROCESSES, (rank + 1) * EXAMPLES // PROCESSES)
    wrap = torch.nn.parallel.DistributedDataParallel
    found: dict[str, Any] = {name: gradients(folder, own, part, wrap) for name, own in SETTINGS.items()}
    found["trained"] = train(folder, out / "trainer", batch_size=4)
    torch.save(found, out / f"rank-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
