"""Fine-tune a sparse classifier with Transformers' Trainer.

python examples/trainer.py
python examples/trainer.py --model distilbert-base-uncased --data your.csv   (columns review and opinion)
"""

import argparse
from pathlib import Path

import pandas as pd
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import crisp_attention as crisp
from crisp_attention.experiment.training.model import resolve

parser = argparse.ArgumentParser()
parser.add_argument(
    "--model", default="minilm-l6", help="minilm-l6 comes from the package index; or a folder, a hub name"
)
parser.add_argument("--data", default=Path(__file__).parent / "reviews.csv", type=Path)
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--out", default="sparse-reviews")
arguments = parser.parse_args()

folder = resolve(arguments.model).folder
tokenizer = AutoTokenizer.from_pretrained(folder)
data = Dataset.from_pandas(pd.read_csv(arguments.data)).rename_column("opinion", "labels").class_encode_column("labels")
data = data.map(lambda rows: tokenizer(rows["review"], truncation=True), batched=True, remove_columns="review")
data = data.train_test_split(test_size=0.2, seed=0)

# From here on it is about sparsity. Sparsity rises to 80% over the first half of training.
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
crisp.sparsify(model, sparsity=0.8, schedule={"kind": "cubic", "end": 0.5})
print(crisp.check(model))

trainer = Trainer(
    model,
    TrainingArguments(arguments.out, num_train_epochs=arguments.epochs, logging_steps=5, report_to=[], seed=0),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=tokenizer,
    compute_metrics=lambda answers: {"accuracy": (answers.predictions.argmax(-1) == answers.label_ids).mean()},
    callbacks=[crisp.SparsityCallback()],  # drives the schedule; realised sparsity stands in the logs
)
trainer.train()
print("sparse:", trainer.evaluate())
with crisp.dense(model):
    print("the same weights, dense:", trainer.evaluate())

trainer.save_model(arguments.out)
print("loaded again:", crisp.load(AutoModelForSequenceClassification, arguments.out).config.crisp_attention)
