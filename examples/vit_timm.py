"""Train a sparse Vision Transformer of timm on handwritten digits (pip install timm).

python examples/vit_timm.py
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits

import crisp_attention as crisp

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--examples", type=int, default=1500, help="of 1797; the others are for testing")
arguments = parser.parse_args()

torch.manual_seed(0)
images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
images = torch.nn.functional.interpolate(images, size=(16, 16))
train, test = slice(0, arguments.examples), slice(1500, None)

# Any timm model whose layers are timm's attention; pretrained=True where the hub can be reached.
size = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 3}
model = timm.create_model("vit_tiny_patch16_224", **size)
crisp.sparsify(model, sparsity=0.5, keep_first=1)  # the class token always stays
print(crisp.check(model, inputs={"x": images[:2]}))

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(arguments.epochs):
    model.train()
    for x, y in zip(images[train].split(64), labels[train].split(64), strict=True):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), crisp.monitor(model) as monitor:
        accuracy = (model(images[test]).argmax(-1) == labels[test]).float().mean()
    print(f"epoch {epoch + 1}: accuracy {accuracy:.3f}, {monitor.mean(training=False):.0%} of all pairs removed")
