"""The model card of an exported iterate: what it is, where it comes from, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from spin_lightning.data.data_record import read_data_records
from spin_lightning.export.checks import Verification
from spin_lightning.policies.loading import quantization_config
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.saved import SavedIterate
from spin_lightning.report.measures import MEASURES
from spin_lightning.run.files import read_json
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord

_PACKAGES: Final = ("spin-lightning", "torch", "transformers", "peft", "bitsandbytes", "tokenizers")
# Fields of a run's fingerprint, in the order of the card; others are left out.
_SETTINGS: Final = (
    "beta",
    "history",
    "alpha",
    "mixture",
    "reference",
    "loss",
    "real_nll_weight",
    "rows",
    "refresh",
    "learning_rate",
    "optimizer",
    "weight_decay",
    "schedule",
    "warmup_ratio",
    "epochs_per_iterate",
    "schedule_epochs",
    "batch_size",
    "samples_per_prompt",
    "prompts_per_iterate",
    "max_response_tokens",
    "temperature",
    "top_k",
    "top_p",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "quantization",
    "compute_dtype",
    "seed",
)
# Folders of the machine that a card, which may be published, does not name.
_LOCAL_PATH: Final = re.compile(r"(?<![\w.:/])(?:~|\.{0,2})/(?:[^\s'\",]+/)+")
_CARD: Final = """\
---
{front}
---

# {title}

Iterate {t} of a self-play run with spin-lightning \
({variant}). {kind}

## Load it

```python
{code}
```

{notes}
## Check

{check}

{rows}

## Run

{settings}

## Data

{data}

## Metrics

{metrics}

## Versions

{versions}
"""


def model_card(run: RunFolder, saved: SavedIterate, merged: bool, found: Verification) -> str:
    """The card as Markdown.

    Args:
        run: The run.
        saved: The iterate.
        merged: Whether the folder is a full model, and not an adapter.
        found: What the verification found.

    Raises:
        RunFolderError: A record of the run is damaged.
    """
    record, t = run.record(saved.index), saved.index
    fields = record.fingerprint_fields
    variant = record.variant or "unknown variant"
    name = base_name(saved.base)
    kind = (
        f"A full model: the adapter is merged into `{name}`."
        if merged
        else f"A LoRA adapter for PEFT; the base model is `{name}`, which is not in this folder."
    )
    return _CARD.format(
        front="\n".join(_front(saved, merged)),
        title=f"{Path(name).name}, {variant}, iterate {t}",
        t=t,
        variant=variant,
        kind=kind,
        code=load_code(saved, merged),
        notes="".join(f"{note}\n\n" for note in _notes(run, saved, merged)),
        check=str(found),
        rows=_markdown(found.table()),
        settings=_markdown([["setting", "value"], ["variant", variant], *_settings(fields)]),
        data=_data(run),
        metrics=_metrics(run.record(0) if 0 in run.known_iterates() else record, record),
        versions=", ".join(_versions()),
    )


def load_code(saved: SavedIterate, merged: bool) -> str:
    """Python that loads the folder by transformers and PEFT, and answers one prompt."""
    base = saved.base
    quantization = None if merged else quantization_config(base)
    more = ", BitsAndBytesConfig" if quantization else ""
    lines = ["import torch"]
    lines += [] if merged else ["from peft import PeftModel"]
    lines += [
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{more}",
        "",
        'folder = "."  # this folder, or its name on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    given = f"dtype={base.dtype}"
    if base.trust_remote_code:
        given += ", trust_remote_code=True"
    if merged:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained(folder, {given}).eval()")
    else:
        revision = saved.commit or base.revision
        given += f', revision="{revision}"' if revision else ""
        if quantization is not None:
            options = {k: v for k, v in quantization.to_diff_dict().items() if k != "quant_method"}
            listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
            lines.append(f"quantization = BitsAndBytesConfig({listed})")
            given += ", quantization_config=quantization"
        lines.append(f'base = AutoModelForCausalLM.from_pretrained("{base.name}", {given})')
        lines.append("model = PeftModel.from_pretrained(base, folder).eval()")
    if saved.tokenizer.chat_template is None:
        lines.append('inputs = tokenizer("Your prompt", return_tensors="pt")')
    else:
        lines += [
            'messages = [{"role": "user", "content": "Your prompt"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    return "\n".join(
        [
            *lines,
            'ids = inputs["input_ids"].to(model.device)',
            "mask = ids.new_ones(ids.shape)",
            "output = model.generate(ids, attention_mask=mask, max_new_tokens=64)",
            "print(tokenizer.decode(output[0, ids.shape[1] :]))",
        ]
    )


def base_name(base: FrozenBase) -> str:
    """The base's hub id, or the name of its folder without the path."""
    return Path(base.name).name if is_local(base) else base.name


def is_local(base: FrozenBase) -> bool:
    """Whether the base is a folder of this machine, which others do not have."""
    return Path(base.name).is_dir()


def _front(saved: SavedIterate, merged: bool) -> Iterator[str]:
    """Metadata that the hub reads."""
    yield f"library_name: {'transformers' if merged else 'peft'}"
    yield "pipeline_tag: text-generation"
    if not is_local(saved.base):
        yield f"base_model: {saved.base.name}"
    yield "tags:"
    yield from (
        f"- {tag}" for tag in ("self-play", "spin-lightning", *([] if merged else ["lora"]))
    )


def _notes(run: RunFolder, saved: SavedIterate, merged: bool) -> Iterator[str]:
    if is_local(saved.base) and not merged:
        yield (
            "The base model is a folder of the machine that made the run. Elsewhere, change its "
            "path above and in `adapter_config.json`, and use the same weights: on others the "
            "adapter gives other answers."
        )
    if saved.base.quantization != "none" and not merged:
        yield (
            f"The adapter was trained on the base in {saved.base.quantization}. Without that "
            "quantization its log-probs differ somewhat."
        )
    if saved.tokenizer.chat_template is None:
        yield (
            "The tokenizer has no chat template: a prompt is plain text, and the response follows "
            "it directly."
        )
    elif run.first_date() is not None:
        yield (
            "The chat template writes today's date into the prompt. The run was made with "
            f"{run.first_date()}."
        )
    if saved.tokenizer.chat_template is not None:
        yield (
            "The chat template in this folder is the one of the run. Servers that bring a template "
            "of their own ask the model in another way than it was trained."
        )


def _settings(fields: Mapping[str, Any]) -> list[list[str]]:
    return [[name, _shown(fields[name])] for name in _SETTINGS if fields.get(name) is not None]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else _without_paths(str(value))


def _data(run: RunFolder) -> str:
    if not run.data.exists():
        return "The run keeps no record of its data."
    fix = "delete it: the model card then says nothing about the data"
    records = read_json(run.data, fix, read_data_records)
    return "\n".join(f"- `{_without_paths(r.source)}`: {r.counts}" for r in records)


def _metrics(first: IterateRecord, record: IterateRecord) -> str:
    start, own = first.measured, record.measured
    shown = [measure for measure in MEASURES if measure.name in own]
    if not shown:
        return "The run has not measured this iterate."
    head = ["metric", "meaning", f"p{first.index}", f"p{record.index}"]
    rows = [
        [
            f"`{m.name}`",
            m.meaning,
            f"{start[m.name]:.4g}" if m.name in start else "–",
            f"{own[m.name]:.4g}",
        ]
        for m in shown
    ]
    return _markdown([head, *rows])


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def _without_paths(text: str) -> str:
    """A text in which files and folders of this machine are named without where they are.

    >>> _without_paths("data='/home/me/secret project/x/answers.jsonl', HuggingFaceH4/data:train")
    "data='…/secret project/x/answers.jsonl', HuggingFaceH4/data:train"
    >>> _without_paths("/home/me/answers.jsonl")
    '…/answers.jsonl'
    """
    return _LOCAL_PATH.sub("…/", text)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *others = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
