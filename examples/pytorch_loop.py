"""Train a sparse Transformer in a plain PyTorch loop: handwritten digits, a token for each row of pixels.

python examples/pytorch_loop.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import crisp_attention as crisp

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--examples", type=int, default=1500, help="of 1797; the others are for testing")
arguments = parser.parse_args()

torch.manual_seed(0)
images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = images.float().view(-1, 8, 8) / 16  # [examples, rows, pixels]
train, test = slice(0, arguments.examples), slice(1500, None)


class Classifier(nn.Module):
    """Two Transformer layers over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.place = nn.Parameter(0.02 * torch.randn(8, 64))
        layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[B, 8, 8]` to scores `[B, 10]`."""
        return self.head(self.encoder(self.embed(images) + self.place).mean(dim=1))


model = Classifier()
crisp.sparsify(model, sparsity=0.5, schedule={"kind": "linear", "end": 0.5})
print(crisp.check(model, inputs={"images": images[:2]}))

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
batches = list(zip(images[train].split(64), labels[train].split(64), strict=True))
steps = arguments.epochs * len(batches)
for epoch in range(arguments.epochs):
    model.train()
    for number, (x, y) in enumerate(batches):
        crisp.set_progress(model, (epoch * len(batches) + number) / steps)  # the schedule follows it
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    crisp.set_progress(model, (epoch + 1) / arguments.epochs)
    with torch.no_grad(), crisp.monitor(model) as monitor:
        accuracy = (model(images[test]).argmax(-1) == labels[test]).float().mean()
    print(f"epoch {epoch + 1}: accuracy {accuracy:.3f}, {monitor.mean(training=False):.0%} of all pairs removed")
