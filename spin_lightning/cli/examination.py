"""What `doctor` finds out about a machine, line by line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spin_lightning.callbacks.memory_table import (
    LongestRow,
    largest_batches,
    predicted_phases,
    readable,
)
from spin_lightning.cli.reading import data_and_model, read_config
from spin_lightning.cli.speed_trial import Speed, measure
from spin_lightning.data.datamodule import SelfPlayDataModule
from spin_lightning.errors import SettingError, SpinError, first_line
from spin_lightning.generation import lanes_trial
from spin_lightning.generation.decoding import Decoder
from spin_lightning.generation.sampler import Sampler
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.generation.slots import ColumnSlots, EqualSlots, Slots
from spin_lightning.generation.varlen_slots import VarlenSlots
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.modules.checks import check_precision
from spin_lightning.modules.spin import SPIN
from spin_lightning.out_of_memory import is_out_of_memory
from spin_lightning.packing import pack_prompts
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.paths import attention_path, bitsandbytes_build, fused_layers
from spin_lightning.policies.probes import Finding, probe_kernels
from spin_lightning.policies.self_check import judge_passes
from spin_lightning.run.progress import duration

_SLOTS: Mapping[type[Slots], str] = {
    VarlenSlots: "refilled slots, each read up to its length",
    ColumnSlots: "refilled slots, padded to the longest",
    EqualSlots: "prompts of one length at a time",
}
_DRIVER = Path("/proc/driver/nvidia/version")
_PLAIN = "set model.packing: padded and model.fused_lora: false"
_SMALLER = (
    "set a smaller data.max_prompt_tokens, data.max_response_tokens or generation.batch_tokens, "
    "model.activation_checkpointing: true, or model.quantization: nf4"
)


def examine(config: Path | None) -> Iterator[Finding]:
    """Examine this machine.

    Args:
        config: A config of `fit`; None for a small model.

    Yields:
        The findings, as they are made.

    Raises:
        SpinError: The config cannot be used, or its model cannot be read.
    """
    trainer = _trainer_settings({} if config is None else read_config(config))
    on_gpu = torch.cuda.is_available() and trainer.get("accelerator") != "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    yield from _machine(device)
    yield from _versions()
    yield _precision(trainer.get("precision"))
    yield from probe_kernels(device)
    with _module(config) as (module, data):
        spec = module.policy_spec.on(device)
        spec.check()
        yield Finding("compute dtype", str(spec.base.dtype).removeprefix("torch."))
        policy = spec.build(device, seed=0)
        module.policy = policy
        yield Finding("packing", spec.packing_in_use)
        yield Finding("attention", attention_path(policy))
        yield Finding("decoding", _decoding(policy))
        yield Finding("fused LoRA", "{} of {} layers".format(*fused_layers(policy)))
        yield _self_check(policy, module.vocabulary)
        row = None if data is None else _longest_row(module, data)
        yield from _speed(module, row)
        if data is None or row is None:
            yield Finding("predicted memory", "give --config")
        else:
            yield from _servers(module, row)
            yield from _memory(module, row, data.batch_size, device)


def _machine(device: torch.device) -> Iterator[Finding]:
    if device.type == "cpu":
        gpu = "; there is a GPU, which is not used" if torch.cuda.is_available() else ""
        yield Finding("device", f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} used{gpu}")
        yield Finding("memory", readable(_total_memory(device)))
        return
    card = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    yield Finding("device", f"{card.name}, compute capability {card.major}.{card.minor}")
    yield Finding("driver", _driver())
    yield Finding("memory", f"{readable(free)} of {readable(total)} free")


def _driver() -> str:
    """Version of the GPU's driver, from the file in which Linux shows it."""
    try:
        return next(iter(_DRIVER.read_text().splitlines()), "unknown")
    except OSError as error:
        return f"unknown ({first_line(error)})"


def _versions() -> Iterator[Finding]:
    yield Finding("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    try:
        build = bitsandbytes_build()
    # A library that is missing or does not fit raises errors of many classes.
    except Exception as error:
        fix = "install a bitsandbytes that fits this torch, or set model.quantization: none"
        yield Finding("bitsandbytes", f"cannot be used ({first_line(error)})", fix)
        return
    yield Finding("bitsandbytes", f"{version('bitsandbytes')}, {build}")


def _precision(given: Any) -> Finding:
    products = torch.get_float32_matmul_precision()
    try:
        check_precision(given or "32-true")
    except SettingError as error:
        return Finding("precision", str(given), error.fix)
    return Finding("precision", f"32-true, float32 products: {products}")


def _decoding(policy: LoraPolicy) -> str:
    """How rows are read while they are decoded."""
    decoder = Decoder(policy.model, Sampler(GenerationSettings()), stop_ids=(), pad_id=0)
    kind = decoder.kind_of_slots
    return lanes_trial.deviations().get("decoding") or _SLOTS[kind]


def _self_check(policy: LoraPolicy, vocabulary: int) -> Finding:
    """Judge the passes on two prompts of random ids with two responses each."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        drawn: list[int] = torch.randint(vocabulary, (count,), generator=generator).tolist()
        return drawn

    batch = pack_prompts([ids(24), ids(17)], [[ids(16), ids(9)], [ids(12), ids(21)]])
    try:
        verdict = judge_passes(policy, batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Finding("self-check", f"memory does not suffice ({first_line(error)})", _SMALLER)
    return Finding("self-check", verdict.text, None if verdict.agrees else _PLAIN)


def _speed(module: SelfPlayModule, row: LongestRow | None) -> Iterator[Finding]:
    """Measure the phases of a run, and tell the time of rows that are as long as the caps allow."""
    try:
        with TemporaryDirectory(prefix="spin-lightning-doctor-") as folder:
            speed = measure(module, Path(folder))
    # Kernels that do not support a device raise errors of many classes.
    except Exception as error:
        fix = _SMALLER if is_out_of_memory(error) or isinstance(error, SpinError) else _PLAIN
        yield Finding("speed", f"cannot be measured ({first_line(error)})", fix)
        return
    for phase, tokens in zip(Speed._fields, speed, strict=True):
        yield Finding(f"speed of {phase}", f"{tokens:,.0f} tokens per second")
    if row is not None:
        spans = [1000 * seconds for seconds in speed.seconds(row)]
        parts = ", ".join(
            f"{phase} {duration(span)}" for phase, span in zip(Speed._fields, spans, strict=True)
        )
        yield Finding("1,000 of the longest rows", f"{duration(sum(spans))}: {parts}")


def _servers(module: SelfPlayModule, row: LongestRow) -> Iterator[Finding]:
    """Whether the servers that generate can be used, as far as it shows without weights."""
    settings = module.generation
    if settings.engine == "local":
        return
    generator = module.make_generator((), 0, settings)
    try:
        generator.check(row.prompt + (row.generated or row.real))
    except SpinError as error:
        yield Finding("generation", error.problem, error.fix)
        return
    yield Finding("generation", f"vLLM at {', '.join(settings.servers)}; the run compares the base")


def _longest_row(module: SelfPlayModule, data: SelfPlayDataModule) -> LongestRow:
    """A row that is as long as the caps allow."""
    cap = min(data.max_response_tokens, module.context_length - 1)
    room = module.context_length - cap
    return LongestRow(
        prompt=min(data.max_prompt_tokens or room, room),
        real=cap,
        generated=None if module.opponent(0) is None else cap,
        samples=data.samples_per_prompt * module.rows_per_sample(0),
        uses_first=module.uses_first_responses,
    )


def _memory(
    module: SelfPlayModule, row: LongestRow, pairs: int, device: torch.device
) -> Iterator[Finding]:
    """Predict the memory of such rows, and how many of them fit at once."""
    total = _total_memory(device)
    try:
        phases = predicted_phases(module, row, pairs, device)
        largest = largest_batches(module, row, device, total)
    except SpinError as error:
        yield Finding("predicted memory", error.problem)
        return
    for phase in phases:
        text = f"{readable(phase.size)}, in all {readable(phase.in_all)}"
        yield Finding(phase.name, text, None if phase.in_all <= total else _SMALLER)
    counts = {phase: rows for phase, rows in largest._asdict().items() if rows is not None}
    text = ", ".join(f"{phase} {rows:,}" for phase, rows in counts.items())
    yield Finding("longest rows that fit at once", text)


def _total_memory(device: torch.device) -> int:
    """Memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _trainer_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = config.get("trainer")
    return settings if isinstance(settings, dict) else {}


@contextmanager
def _module(config: Path | None) -> Iterator[tuple[SelfPlayModule, SelfPlayDataModule | None]]:
    """The module of a config with its data, or one of a small model with random weights."""
    if config is not None:
        data, module = data_and_model(str(config), {}, None)
        yield module, data
        return
    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with TemporaryDirectory(prefix="spin-lightning-doctor-") as folder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(shape).save_pretrained(folder)
        yield SPIN(model=folder), None
