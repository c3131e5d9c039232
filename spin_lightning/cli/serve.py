"""`serve`: the command that starts a vLLM server for a run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from spin_lightning.cli.parsing import command_parser
from spin_lightning.errors import RunFolderError, SettingError, SpinError

if TYPE_CHECKING:
    from spin_lightning.data.datamodule import SelfPlayDataModule
    from spin_lightning.modules.base import SelfPlayModule

# The values that vLLM takes for --max-lora-rank.
_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Adapters of one batch at most: each takes memory, and more of them wait for a place.
_MOST_ADAPTERS: Final = 16
# Without trainer.max_epochs in the config.
_ITERATES: Final = 4


def serve(args: list[str]) -> None:
    """Print the command that starts a vLLM server for a run, or run it.

    The server has the run's base in the run's precision, and takes adapters of its rank while it
    runs. Name it in the run's config: generation.engine: vllm, generation.servers: [URL].
    """
    parser = command_parser("serve", serve)
    parser.add_argument("run", nargs="?", help="The run folder; or give --config.")
    parser.add_argument("--config", help="A config of `fit`; default: that of the run folder.")
    parser.add_argument(
        "--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 for other machines."
    )
    parser.add_argument("--port", type=int, default=8000, help="Port to listen at.")
    parser.add_argument(
        "--max_loras",
        type=int | None,
        help="Adapters of one batch; default: what the opponent needs and one more, at most 16.",
    )
    parser.add_argument(
        "--sleep",
        nargs="?",
        type=bool,
        const=True,
        default=False,
        help="Let it free its card while the run trains (generation.sleep: true).",
    )
    parser.add_argument("--options", help="Further options of `vllm serve`, in quotes.")
    parser.add_argument(
        "--exec",
        nargs="?",
        type=bool,
        const=True,
        default=False,
        help="Run the command in place of this process.",
    )
    given = parser.parse_args(args)
    if (given.run is None) == (given.config is None):
        raise SpinError("nothing to serve", fix="give a run folder, or --config with a config")

    from rich.console import Console

    from spin_lightning.callbacks.console import console, quiet_libraries
    from spin_lightning.cli.reading import data_and_model, read_config

    quiet_libraries()
    config = Path(given.config) if given.run is None else _config_of(Path(given.run))
    data, module = data_and_model(str(config), {}, None)
    adapters = given.max_loras or _adapters(module, read_config(config))
    command = serve_command(module, data, adapters)
    command.options += ["--host", given.host, "--port", str(given.port)]
    if given.sleep:
        command.options.append("--enable-sleep-mode")
        command.variables["VLLM_SERVER_DEV_MODE"] = "1"
    command.options += shlex.split(given.options or "")
    console.print(command.text, markup=False)
    if module.policy_spec.base.quantization != "none":
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"NOTE: vLLM's weights are not those of quantization: "
            f"{module.policy_spec.base.quantization}. The run measures the difference at its start "
            "and refuses more than generation.largest_gap."
        )
    if given.exec:
        command.execute()


@dataclass
class ServeCommand:
    """A call of `vllm serve`.

    Attributes:
        model: What it serves.
        options: Its options, each value after its name.
        variables: Environment variables that it needs.
    """

    model: str
    options: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The command for a shell, an option a line."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        lines = [" ".join([*words, "vllm serve", shlex.quote(self.model)])]
        for word in self.options:
            if word.startswith("--"):
                lines.append(f"  {word}")
            else:
                lines[-1] += f" {shlex.quote(word)}"
        return " \\\n".join(lines)

    def execute(self) -> None:
        """Run it in place of this process.

        Raises:
            SpinError: vLLM is not installed.
        """
        words = ["vllm", "serve", self.model, *self.options]
        try:
            os.execvpe(words[0], words, {**os.environ, **self.variables})
        except FileNotFoundError as error:
            raise SpinError(
                "there is no command vllm",
                fix="install vLLM in an environment of its own, and put its bin folder into PATH",
            ) from error


def serve_command(module: SelfPlayModule, data: SelfPlayDataModule, adapters: int) -> ServeCommand:
    """The command for a server that computes a run's iterates.

    Args:
        module: The run's module; no weights are read.
        data: Its data module, whose caps are the longest sequences.
        adapters: Adapters of one batch.

    Raises:
        SettingError: The rank is larger than vLLM takes.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = module.policy_spec.on(device)
    base = spec.base.absolute
    longest = module.context_length
    if data.max_prompt_tokens is not None:
        longest = min(longest, data.max_prompt_tokens + data.max_response_tokens)
    command = ServeCommand(base.name, variables={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"})
    if base.revision is not None:
        command.options += ["--revision", base.revision]
    if base.trust_remote_code:
        command.options.append("--trust-remote-code")
    command.options += ["--dtype", str(base.dtype).removeprefix("torch.")]
    if base.quantization == "nf4":
        command.options += ["--quantization", "bitsandbytes"]
    command.options += [
        *("--generation-config", "vllm"),
        *("--max-model-len", str(longest)),
        "--enable-lora",
        *("--max-loras", str(adapters)),
        *("--max-lora-rank", str(_rank(spec.lora.r, spec.initial_adapter))),
    ]
    return command


def _rank(r: int, initial_adapter: str | None) -> int:
    """The smallest rank that vLLM takes and that holds the run's adapters."""
    from spin_lightning.policies.adapter_check import ADAPTER_CONFIG

    if initial_adapter is not None:
        r = int(json.loads((Path(initial_adapter) / ADAPTER_CONFIG).read_text())["r"])
    fitting = [rank for rank in _RANKS if rank >= r]
    if not fitting:
        raise SettingError(
            "lora_r", r, f"vLLM takes ranks up to {_RANKS[-1]}", fix=f"give at most {_RANKS[-1]}"
        )
    return fitting[0]


def _adapters(module: SelfPlayModule, config: Mapping[str, Any]) -> int:
    """Most adapters that an opponent of the run has at once, and a spare one."""
    trainer = config.get("trainer")
    epochs = trainer.get("max_epochs") if isinstance(trainer, dict) else None
    iterates = (epochs or _ITERATES * module.epochs_per_iterate) // module.epochs_per_iterate
    bare = {0} if module.policy_spec.initial_adapter is None else set()
    opponents = [module.opponent(t) for t in range(max(1, iterates))]
    # A run's own iterates measure themselves on the held-out rows: one at least.
    most = max((len(set(o.members) - bare) for o in opponents if o is not None), default=1)
    return min(_MOST_ADAPTERS, max(1, most) + 1)


def _config_of(run: Path) -> Path:
    config = run / "config.yaml"
    if not config.is_file():
        raise RunFolderError(f"{run} has no config.yaml", fix="give --config with the run's config")
    return config
