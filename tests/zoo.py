"""Every architecture of the installed Transformers, built small and random, and what the audit says of it.

python tests/zoo.py --write docs/compatibility.md     # two processes, a few minutes
python tests/zoo.py bert llama                        # the audits of some, in full
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import multiprocessing
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

import crisp_attention as crisp
from crisp_attention.huggingface.inputs import working_inputs
from zoo_configs import tiny_config

MODEL_TYPES = sorted(CONFIG_MAPPING_NAMES)
LARGEST = 3_000_000
"""Parameters: what stays larger than this when its configuration is made small is not run."""

# What the model itself computes in single precision, or masks with a number that double precision tells from -inf.
_SINGLE = frozenset({"eomt", "eomt_dinov3"})
_WINDOWS = "its image tower has windows of one size, half a minute a run"
_SLOW = {
    "sam3": _WINDOWS,
    "sam3_lite_text": _WINDOWS,
    "sam3_vision_model": _WINDOWS,
    "sam3_vit_model": _WINDOWS,
    "vjepa2": "its predictor looks at whole films, half a minute a run",
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model_type: The architecture, as in `config.json`.
        model: Class of the model; empty where there is none.
        kind: The group in the table: what the model takes.
        verdict: As in an audit, or "no attention", or "not run".
        reason: Why it is not served, or what limits it.
        outcomes: One letter a check: + ok, - failed, . not applicable.
    """

    model_type: str
    model: str
    kind: str
    verdict: str
    reason: str
    outcomes: str


BROKEN = "The audit itself broke"


class NotBuilt(Exception):
    """No small model of this type can be made here; the message says why."""


def model_class(config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The base model of a configuration class, or the nearest that there is."""
    if config in modeling_auto.MODEL_MAPPING:
        found = modeling_auto.MODEL_MAPPING[config]
        found = found[0] if isinstance(found, tuple) else found
        if not (inspect.isclass(found) and issubclass(found, PreTrainedModel)):
            raise NotBuilt(f"Needs packages that are not installed: {', '.join(found._backends)}.")
        return found
    try:
        module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    except ModuleNotFoundError:
        raise NotBuilt("Transformers has no model of its own for this configuration.") from None
    own = [
        item
        for item in vars(module).values()
        if inspect.isclass(item) and issubclass(item, PreTrainedModel) and item.__module__ == module.__name__
        and getattr(item, "config_class", None) is config and "PreTrainedModel" not in item.__name__
    ]  # fmt: skip
    if not own:
        raise NotBuilt("Transformers has no model of its own for this configuration; it is part of a larger one.")
    return own[0]


def build(model_type: str) -> PreTrainedModel:
    """A small random model in evaluation mode, in double precision where it computes in it.

    Raises:
        NotBuilt: If none can be made, with the reason.
    """
    if model_type in _SLOW:
        raise NotBuilt(f"Not run: {_SLOW[model_type]}.")
    try:
        cls = model_class(CONFIG_MAPPING[model_type])
        config = tiny_config(model_type)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(config).parameters())
        if size > LARGEST:
            raise NotBuilt(f"Its configuration does not become small by its fields alone ({size:,} parameters).")
        torch.manual_seed(0)
        model = cls(config).eval()
    except NotBuilt:
        raise
    except ImportError as error:
        package = re.search(r"requires the (\w+) library", str(error))
        raise NotBuilt(f"Needs a package that is not installed: {package[1] if package else _line(error)}.") from None
    except Exception as error:
        raise NotBuilt(f"No small configuration is known ({type(error).__name__}: {_line(error)}).") from None
    _randomise(model)
    # Eager attention adds the lowest number of its precision to scores, which overflows in double precision.
    if model.config._attn_implementation != "eager" and model_type not in _SINGLE:
        _use_double(model)
    return model


def _use_double(model: PreTrainedModel) -> None:
    model.double()
    try:
        with torch.no_grad():
            working_inputs(model)
    except Exception:  # parts of it insist on single precision
        model.float()


def _randomise(model: PreTrainedModel) -> None:
    """Weights so large that attention is far from uniform and every bias and mask matters."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=draw)
                if parameter.dim() < 2:
                    parameter.add_(0.05 * noise)
                else:
                    parameter.copy_(noise / (1 if "embed" in name else parameter[0].numel()) ** 0.5)


def row(model_type: str) -> Row:
    """Build and audit one architecture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = None
        try:
            cls = model_class(CONFIG_MAPPING[model_type])
            if not getattr(cls, "_can_set_attn_implementation", lambda: True)():
                reason = "Computes its attention itself and never calls Transformers' attention interface."
                return Row(model_type, cls.__name__, kind(cls), "refused", reason, "")
            model = build(model_type)
        except NotBuilt as error:
            name = "" if cls is None else cls.__name__
            return Row(model_type, name, "Other" if cls is None else kind(cls), "not run", str(error), "")
        except Exception as error:
            return Row(model_type, "", "Other", "not run", f"No model class ({type(error).__name__}).", "")
        try:
            report = crisp.audit(model)
        except Exception as error:
            return Row(model_type, cls.__name__, kind(cls), "not run", f"{BROKEN}: {_line(repr(error))}", "")
    letters = {"ok": "+", "failed": "-", "not applicable": "."}
    reason, verdict = " ".join(report.reasons), report.verdict
    if "no layer called the attention interface" in reason:
        if not any("Attention" in type(module).__name__ for module in model.modules()):
            verdict, reason = "no attention", "It has no attention layers."
    elif "Pass inputs={...}" in reason:
        verdict, reason = "not run", f"The default inputs do not suit it: {_shorten(reason)}"
    outcomes = "".join(letters[check.outcome] for check in report.checks)
    group = kind(cls)
    if group == "Text: decoders" and any(
        c.name == "no look ahead" and c.outcome == "not applicable" for c in report.checks
    ):
        group = "Text: encoders"  # BERT and its kin can be made decoders, and are none by default
    # How far outputs lie apart depends on the processor, where a model chooses among near values.
    reason = re.sub(r" \(by \S+ of its outputs' scale\)", "", _line(reason))
    return Row(model_type, type(model).__name__, group, verdict, reason, outcomes)


def kind(cls: type[PreTrainedModel]) -> str:
    """What a model takes: the heading that it stands under."""
    takes = set(inspect.signature(cls.forward).parameters)
    sees = bool(takes & {"pixel_values", "pixel_values_videos", "flattened_patches"})
    hears = bool(takes & {"input_features", "input_values", "audio_values"})
    reads = bool(takes & {"input_ids"})
    if (reads and (sees or hears)) or (sees and hears):
        return "Several senses"
    if sees:
        return "Images and video"
    if hears:
        return "Sound"
    if "decoder_input_ids" in takes:
        return "Text: encoder-decoders"
    if reads:
        return "Text: decoders" if "past_key_values" in takes else "Text: encoders"
    return "Other"


def rows(model_types: list[str], processes: int = 2) -> list[Row]:
    """The rows of many architectures, in their order."""
    with multiprocessing.get_context("spawn").Pool(processes, _quiet, maxtasksperchild=120) as pool:
        return pool.map(row, model_types, chunksize=4)


def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()


def _line(error: object) -> str:
    return " ".join(str(error).split())


def _shorten(reason: str) -> str:
    inner = reason.partition("; ")[2].partition("). Pass inputs")[0] or "none are known for its kind"
    return _line(inner)[:140].replace("|", "/") + "."


def main() -> None:
    """Print audits, or write the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model_types", nargs="*", help="audit these and print the reports")
    arguments.add_argument("--write", type=Path, help="audit all and write the table")
    chosen = arguments.parse_args()
    _quiet()
    if chosen.write:
        from zoo_table import page

        chosen.write.write_text(page(rows(MODEL_TYPES)), encoding="utf-8")
    for model_type in chosen.model_types:
        print(row(model_type))
        try:
            print(crisp.audit(build(model_type)))
        except NotBuilt as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
