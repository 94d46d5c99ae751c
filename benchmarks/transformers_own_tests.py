"""An outside judge: Transformers' own model tests, with our operator in place of its SDPA function.

Transformers compares every model's SDPA attention with its eager one, over dtypes, padding sides, masks
and requested attention weights, trains it, compiles it and batches it. Here "sdpa" is the operator at
sparsity 0, on its own path (never handed on to the stock kernel), so that those tests judge us.

The common tests come with the source distribution of Transformers. For the installed version:

    pip download --no-deps --no-binary :all: transformers==VERSION   # or the .tar.gz from the package index
    tar xzf transformers-VERSION.tar.gz
    pip install parameterized
    python benchmarks/transformers_own_tests.py transformers-VERSION/tests [pytest options]

With `--stock` in front of the options the same tests run on the stock functions, so that failures that
are not ours can be told apart.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from crisp_attention.backends.call import Detail
from crisp_attention.config import SparsityConfig
from crisp_attention.huggingface.interface import crisp_attention_forward, crisp_mask
from crisp_attention.operator import AttentionOutput
from crisp_attention.state import LayerState, ModelState, attach

_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
_FOLDER, _STOCK_FLAG = "CRISP_TRANSFORMERS_TESTS", "CRISP_TRANSFORMERS_STOCK"
_STOCK = _STOCK_FLAG in os.environ
_BATCH, _LENGTH, _VOCABULARY = 13, 7, 99


class _Watched:
    """A monitor keeps the operator on its own path; it counts the calls that it saw."""

    detail = Detail.OUTPUT
    calls = 0

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        type(self).calls += 1


def _operator(module: torch.nn.Module, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
    if "_crisp_layer" not in module.__dict__:
        state = ModelState(SparsityConfig(sparsity=0.0), monitors=[_Watched()])
        attach(module, LayerState(type(module).__name__, 0, 1, state))
    output, weights = crisp_attention_forward(module, *args, **kwargs)  # type: ignore[arg-type]
    return output, weights if kwargs.get("output_attentions") else None


def _common_tests(folder: Path) -> types.ModuleType:
    """Import the common tests, with empty stand-ins for the packages that the distribution leaves out."""
    sys.path.insert(0, str(folder.parent))
    package = types.ModuleType(folder.name)
    package.__path__ = [str(folder)]
    sys.modules[folder.name] = package
    for room, module, name in (
        ("exporters", "test_export", "ExportTesterMixin"),
        ("generation", "test_utils", "GenerationTesterMixin"),
    ):
        for path in (f"{folder.name}.{room}", f"{folder.name}.{room}.{module}"):
            sys.modules[path] = types.ModuleType(path)
        setattr(sys.modules[f"{folder.name}.{room}.{module}"], name, type(name, (), {}))
    return importlib.import_module(f"{folder.name}.test_modeling_common")


class _Tester:
    """The small configuration and batch that the common tests ask for."""

    batch_size, seq_length, is_training = _BATCH, _LENGTH, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        if config.model_type == "vit":
            self.seq_length = 1 + (config.image_size // config.patch_size) ** 2
            self.num_masks = self.mask_length = self.seq_length - 1

    def get_config(self) -> PreTrainedConfig:
        return self.config

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        config = copy.deepcopy(self.config)
        if config.model_type == "vit":
            return config, {"pixel_values": torch.rand(_BATCH, 3, 30, 30)}
        mask = torch.ones(_BATCH, _LENGTH, dtype=torch.long).tril()
        mask[_LENGTH:] = 1
        return config, {"input_ids": torch.randint(3, _VOCABULARY, (_BATCH, _LENGTH)), "attention_mask": mask}


def _families() -> dict[str, tuple[PreTrainedConfig, tuple[type, ...]]]:
    distilbert = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37, "vocab_size": _VOCABULARY}
    return {
        "Bert": (
            BertConfig(vocab_size=_VOCABULARY, **_WIDTH),
            (BertModel, BertForMaskedLM, BertForSequenceClassification),
        ),
        "DistilBert": (
            DistilBertConfig(**distilbert),
            (DistilBertModel, DistilBertForMaskedLM, DistilBertForSequenceClassification),
        ),
        "Llama": (
            LlamaConfig(vocab_size=_VOCABULARY, num_key_value_heads=2, pad_token_id=0, **_WIDTH),
            (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification),
        ),
        "ViT": (ViTConfig(image_size=30, patch_size=2, **_WIDTH), (ViTModel, ViTForImageClassification)),
    }


def _define(common: types.ModuleType) -> None:
    """One test class a family, and last a test of the judge, in this module, where pytest finds them."""
    generation = sys.modules[f"{common.__package__}.generation.test_utils"].GenerationTesterMixin
    for name, (config, classes) in _families().items():

        def set_up(self: unittest.TestCase, config: PreTrainedConfig = config) -> None:
            self.model_tester = _Tester(config)  # type: ignore[attr-defined]
            self.config_tester = None  # type: ignore[attr-defined]

        bases = (common.ModelTesterMixin, *((generation,) if name == "Llama" else ()), unittest.TestCase)
        members = {"all_model_classes": classes, "setUp": set_up, "__module__": __name__}
        if name == "ViT":
            # Transformers' own tests of ViT skip it: an image has no table of embeddings.
            members |= {"test_resize_embeddings": False, "test_model_get_set_embeddings": None}
        globals()[f"{name}OwnTest"] = type(f"{name}OwnTest", bases, members)

    def test_the_operator_was_called() -> None:
        """Last of all: the tests above judged us, or the stock functions, as asked."""
        assert (_Watched.calls > 0) is not _STOCK

    globals()["test_the_operator_was_called"] = test_the_operator_was_called


def main(arguments: list[str]) -> int:
    """Run pytest on this file; returns its exit status."""
    if not arguments or not Path(arguments[0], "test_modeling_common.py").is_file():
        print(__doc__)
        print("Expected the tests folder of Transformers' source distribution as the first argument.")
        return 2
    folder, *options = arguments
    os.environ[_FOLDER] = str(Path(folder).resolve())
    if options[:1] == ["--stock"]:
        os.environ[_STOCK_FLAG] = "1"
        del options[0]
    return int(
        pytest.main(["-q", "--disable-warnings", "-p", "no:cacheprovider", "-c", os.devnull, __file__, *options])
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

if _FOLDER in os.environ:
    if not _STOCK:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", _operator)
        ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", crisp_mask)
    _define(_common_tests(Path(os.environ[_FOLDER])))
