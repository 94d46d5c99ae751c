"""Fine-tune a sparse model with LoRA (pip install peft): few weights are trained, and attention is sparse.

python examples/lora_peft.py
python examples/lora_peft.py --model distilbert-base-uncased --targets q_lin v_lin
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import crisp_attention as crisp
from crisp_attention.experiment.training.model import resolve

parser = argparse.ArgumentParser()
parser.add_argument(
    "--model", default="minilm-l6", help="minilm-l6 comes from the package index; or a folder, a hub name"
)
parser.add_argument("--targets", nargs="+", default=["query", "value"], help="the layers that LoRA adapts")
parser.add_argument("--data", default=Path(__file__).parent / "reviews.csv", type=Path)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--out", default="sparse-reviews-lora")
arguments = parser.parse_args()

torch.manual_seed(0)
folder = resolve(arguments.model).folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

# Sparse first, then LoRA; the other way round works too.
crisp.sparsify(model, sparsity=0.5)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=arguments.targets))
model.print_trainable_parameters()
print(crisp.check(model))

rows = pd.read_csv(arguments.data)
labels = torch.tensor((rows["opinion"] == "good").to_numpy(), dtype=torch.long)
texts = rows["review"].tolist()
held_out = len(texts) // 5


def batch(rows: slice) -> dict[str, torch.Tensor]:
    """Token ids, masks and labels of some rows."""
    return {**tokenizer(texts[rows], padding=True, truncation=True, return_tensors="pt"), "labels": labels[rows]}


optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=2e-3)
for epoch in range(arguments.epochs):
    model.train()
    for start in range(held_out, len(texts), 16):
        model(**batch(slice(start, start + 16))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), crisp.monitor(model) as monitor:
        answers = model(**batch(slice(0, held_out))).logits.argmax(-1)
    accuracy = (answers == labels[:held_out]).float().mean()
    print(f"epoch {epoch + 1}: accuracy {accuracy:.3f}, {monitor.mean(training=False):.0%} of all pairs removed")

# LoRA's part goes into the weights; the settings of sparsity are saved with them.
model.merge_and_unload().save_pretrained(arguments.out)
print("loaded again:", crisp.load(AutoModelForSequenceClassification, arguments.out).config.crisp_attention)
