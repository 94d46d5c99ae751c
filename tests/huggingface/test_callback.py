from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import crisp_attention as crisp


def trainer(model, folder, steps=4):
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(5, 20, (12,), generator=draw), "labels": torch.tensor(number % 2)}
        for number in range(32)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[crisp.SparsityCallback()])


def test_logs_realised_sparsity(bert, tmp_path):
    run = trainer(crisp.sparsify(bert, sparsity=0.5), tmp_path)
    run.train()
    logged = [entry["realised_sparsity"] for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert logged == pytest.approx([0.5] * 4, abs=0.01)


def test_stops_watching_at_the_end(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.5)
    trainer(bert, tmp_path).train()
    layer = bert.bert.encoder.layer[0].attention.self.__dict__["_crisp_layer"]
    assert layer.model.monitors == []


def test_ties_random_draws_to_the_global_step(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.5, rule="random")
    bert(input_ids=torch.arange(5, 15)[None])  # forwards outside of training count for nothing
    trainer(bert, tmp_path, steps=3).train()
    layer = bert.bert.encoder.layer[0].attention.self.__dict__["_crisp_layer"]
    assert layer.model.forward_index == 6  # two forwards a step
