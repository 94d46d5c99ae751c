"""Compiled and exported models: whole graphs, few of them, the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing

import crisp_attention as crisp
from crisp_attention.state import layers

pytestmark = pytest.mark.slow

LENGTHS = (8, 12, 16, 20, 24, 31)


def batch(length: int, rows: int = 2):
    ids = torch.randint(5, 20, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1:, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


# Every rule goes through `benchmarks/compile_and_export.py`; compiling takes too long to test them all.
@pytest.mark.parametrize("rule", ["percentile", "random", "topk"])
def test_few_whole_graphs_serve_six_lengths_and_twenty_schedule_steps(bert, rule):
    """Length and sparsity change at each step; graphs are made for the first, then for any."""
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in bert.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    crisp.sparsify(bert, sparsity=0.5, rule=rule, schedule={"kind": "cubic", "initial": 0.1}).train()
    plain = copy.deepcopy(bert)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(bert, backend=counter, fullgraph=True)
    for step in range(20):
        for model in (bert, plain):
            crisp.set_progress(model, step / 20)
        inputs = batch(LENGTHS[step % 6])
        ours, expected = compiled(**inputs).logits, plain(**inputs).logits
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        ours.sum().backward()
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def test_a_compiled_random_rule_still_draws_anew_each_step(bert):
    crisp.sparsify(bert, sparsity=0.5, rule="random").train()
    torch._dynamo.reset()
    compiled = torch.compile(bert, backend="eager", fullgraph=True)
    state = next(iter(layers(bert).values())).model
    for step in range(3):
        compiled(**batch(12))
        assert int(state.forward_index) == step + 1
    torch._dynamo.reset()


class Logits(torch.nn.Module):
    """A model that takes and returns tensors, as exporters want."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("rule", ["nm", "topk"])
def test_onnx_serves_lengths_that_it_was_not_traced_with(bert, rule, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.mul_(4.0)  # scores that differ: near ties would be broken by rounding
    crisp.sparsify(bert, sparsity=0.5, rule=rule)
    names = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = batch(12)
    program = torch.onnx.export(
        Logits(bert), (example["input_ids"], example["attention_mask"]), dynamo=True, verbose=False,
        dynamic_shapes=(names, names),
    )  # fmt: skip
    program.save(str(tmp_path / "model.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = [item.name for item in session.get_inputs()]
    for length in (12, 20, 37):
        tensors = batch(length, rows=3)
        with torch.no_grad():
            expected = bert(**tensors).logits
        given = dict(zip(inputs, (tensor.numpy() for tensor in tensors.values()), strict=True))
        torch.testing.assert_close(torch.from_numpy(session.run(None, given)[0]), expected, atol=1e-4, rtol=1e-3)
