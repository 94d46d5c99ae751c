"""Does every rule compile into whole graphs, how many, and does an exported model give the same numbers?

For each rule a small BERT is

- compiled with `fullgraph=True` and trained for 20 steps over 6 lengths, its sparsity moved by a cubic
  schedule at each step where the rule has one: graphs made, largest difference from eager;
- exported to ONNX from one length and run by onnxruntime at others: largest difference from eager.

Nothing is timed. Needs onnxruntime and onnxscript (both in the extra [dev]).

    python benchmarks/compile_and_export.py [RULE ...]
"""

from __future__ import annotations

import copy
import io
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch._dynamo
import torch._dynamo.testing
import transformers
from transformers import BertConfig, BertForSequenceClassification

import crisp_attention as crisp
from crisp_attention.traits import RULES

RECORD = Path(__file__).parent.parent / "results" / "benchmarks" / "compile-and-export.json"
LENGTHS = (8, 12, 16, 20, 24, 31)
STEPS = 20
TRACED, OTHERS = 12, (20, 31, 37)


def batch(length: int, rows: int = 2) -> dict[str, torch.Tensor]:
    """Token ids and a mask with padding in all rows but the first."""
    ids = torch.randint(5, 30, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1:, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def model(rule: str, **settings: Any) -> BertForSequenceClassification:
    """A small sparse BERT without dropout whose scores differ well."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=30,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    bert = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.mul_(4.0)
    if "sparsity" in RULES[rule].strengths:
        settings["sparsity"] = 0.5
    if rule == "block_topk":
        settings |= {"query_block": 4, "key_block": 4}
    return crisp.sparsify(bert, rule=rule, **settings)


def count_graphs(rule: str) -> tuple[int, float]:
    """Graphs that were compiled, and the largest difference of a logit from eager."""
    schedule = {"kind": "cubic", "initial": 0.1} if "sparsity" in RULES[rule].strengths else None
    eager = model(rule, schedule=schedule).train()
    twin = copy.deepcopy(eager)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(twin, backend=counter, fullgraph=True)
    worst = 0.0
    for step in range(STEPS):
        for one in (eager, twin):
            crisp.set_progress(one, step / STEPS)
        inputs = batch(LENGTHS[step % len(LENGTHS)])
        logits = compiled(**inputs).logits
        logits.sum().backward()
        worst = max(worst, (logits - eager(**inputs).logits).abs().max().item())
    return counter.frame_count, worst


class Logits(torch.nn.Module):
    """A model that takes and returns tensors, as exporters want."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        return self.inner(input_ids=ids, attention_mask=mask).logits


def compare_onnx(rule: str) -> float:
    """The largest difference of a logit between onnxruntime and eager, at lengths not traced."""
    bert = model(rule).eval()
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        Logits(bert), tuple(batch(TRACED).values()), dynamo=True, verbose=False, dynamic_shapes=(axes, axes)
    )
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program.save(f"{folder}/model.onnx")
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        for length in OTHERS:
            tensors = batch(length, rows=3)
            given = {name: tensor.numpy() for name, tensor in zip(names, tensors.values(), strict=True)}
            got = torch.from_numpy(session.run(None, given)[0])
            worst = max(worst, (got - bert(**tensors).logits).abs().max().item())
    return worst


def main(rules: list[str]) -> None:
    """Print a row a rule; keep the record of a full run."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    print(f"{'rule':12} {'graphs':>6}  {'compiled - eager':>16}  {'ONNX - eager':>12}")
    for rule in rules or sorted(RULES):
        graphs, compiled = count_graphs(rule)
        stdout, sys.stdout = sys.stdout, io.StringIO()  # the exporter reports each of its steps
        try:
            exported = compare_onnx(rule)
        finally:
            sys.stdout = stdout
        rows.append({"rule": rule, "graphs": graphs, "compiled_difference": compiled, "onnx_difference": exported})
        print(f"{rule:12} {graphs:6}  {compiled:16.1e}  {exported:12.1e}", flush=True)
    if not rules:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        record = {"steps": STEPS, "lengths": LENGTHS, "versions": versions, "rows": rows}
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
