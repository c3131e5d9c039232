"""The self-play module: everything that the variants share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spin_lightning import losses
from spin_lightning.errors import RunFolderError, SettingError, is_number, is_whole
from spin_lightning.generation.base import Generator
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.keyed import global_seed
from spin_lightning.metrics import PairMetrics, pair_statistics
from spin_lightning.mixtures import Mixture, Reference
from spin_lightning.modules.checks import check_opponents, iterates_to_play
from spin_lightning.modules.settings import at_iterate, check_choices, lora_settings
from spin_lightning.modules.skipping import check_weights, leaves_out, no_gradient
from spin_lightning.policies import pretrained
from spin_lightning.policies.base import Policy
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import check_adapter
from spin_lightning.policies.optimizers import (
    OptimizerName,
    ScheduleName,
    make_optimizer,
    make_schedule,
)
from spin_lightning.policies.pretrained import ComputeDtype, FrozenBase, Quantization
from spin_lightning.policies.shared_prefix import Packing, shares_prefixes
from spin_lightning.rows.plan import rows_per_sample
from spin_lightning.run.fingerprint import folder_hashes
from spin_lightning.types import PairBatch, PairLogps

# Settings that do not make another run: what they stand for is compared by content, or not at all.
_NOT_COMPARED = frozenset({"model", "revision", "generation"}) | {
    "activation_checkpointing",
    "packing",
    "fused_lora",
    "torch_compile",
    "max_skipped_batches",
}
_MARGIN_ALARM = 0.1


class SelfPlayModule(L.LightningModule, ABC):
    """Trains a policy to prefer the data set's responses over those of an opponent.

    A variant answers three questions with data: who generates (`opponent`), against what log-ratios
    are taken (`reference`), and which scalar is minimized (`objective`; by default the mean of
    `loss` over the margins of the batch). The `SelfPlay` callback does the rest of the loop.

    Args:
        model: Hub id or folder of a causal language model; it stays frozen.
        quantization: Hold the frozen weights in 4 bits (nf4), 8 bits (int8), or as they are.
        compute_dtype: In what the frozen weights compute; auto: bfloat16 on a GPU, else float32.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Let code that comes with the model run.
        lora_r: Rank of the adapter; 16 if nothing is said.
        lora_alpha: LoRA's scaling numerator; 32 if nothing is said.
        lora_dropout: Dropout before the adapter; 0 if nothing is said, which keeps the first
            margin of an iterate at exactly 0.
        lora_target_modules: Layers that get an adapter; all-linear if nothing is said.
        initial_adapter: Folder of a LoRA adapter to start from, such as one that SFT left; it is
            iterate 0, and its config replaces every lora_* setting.
        beta: Temperature of the implicit reward (SPIN's lambda); one value or one per iterate.
        loss: Loss of the margin.
        learning_rate: Peak learning rate; one value or one per iterate.
        optimizer: adamw, rmsprop (as SPIN used), adamw_8bit, or on a GPU paged_adamw_8bit.
        weight_decay: Weight decay of the adapter.
        schedule: Course of the learning rate after the warm-up.
        warmup_ratio: Share of the schedule's steps that warm up.
        real_nll_weight: Weight of an anchor that is added to the objective: the negative
            log-likelihood per token of the real responses, averaged over examples; 0 for none.
        rows: draw: one row per example, its opponent drawn from the mixture; union: one row per
            example and member of the mixture.
        refresh: all: the rows of every iterate are made anew; reservoir: rows of earlier iterates
            are kept as far as the opponent's weights allow.
        epochs_per_iterate: Passes over an iterate's rows.
        schedule_epochs: Epochs that the schedule is spread over; epochs_per_iterate if nothing is
            said. SPIN's published "2 of 6 epochs" is 2 and 6.
        activation_checkpointing: Recompute activations in the backward pass to save memory.
        packing: shared: a prompt is computed once for its real and its generated response; padded:
            each response is a sequence of its own; auto: shared for the architectures that it is
            known to be right for.
        fused_lora: Run LoRA layers by a pass of our own where it computes what PEFT's does.
        torch_compile: Compile the layers for training, which takes minutes at its first steps;
            generation and scoring run uncompiled.
        max_skipped_batches: Batches of a run that may be left out because their loss or a log-prob
            is nan or infinite; 0 stops at the first. Their rows are written down either way.
        generation: How the opponents' responses are sampled.

    Raises:
        SettingError: A value is out of range, or lora_* is given together with initial_adapter.
    """

    # Settings that may be a list, with one value per iterate.
    per_iterate: ClassVar[tuple[str, ...]] = ("beta", "learning_rate")
    # Whether the objective is a function of the margin alone, in which a reference's normalizer,
    # the same for both responses, cancels.
    normalizer_cancels: ClassVar[bool] = True
    # Settings that a variant fixes to None, since it has no use for them.
    without: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        model: str,
        quantization: Quantization = "none",
        compute_dtype: ComputeDtype = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        lora_r: int | None = None,
        lora_alpha: int | None = None,
        lora_dropout: float | None = None,
        lora_target_modules: str | list[str] | None = None,
        initial_adapter: str | None = None,
        beta: float | list[float] | None = 0.1,
        loss: losses.LossName | None = "logistic",
        learning_rate: float | list[float] = 1e-5,
        optimizer: OptimizerName = "adamw",
        weight_decay: float = 0.0,
        schedule: ScheduleName = "linear",
        warmup_ratio: float = 0.1,
        real_nll_weight: float | None = 0.0,
        rows: Literal["draw", "union"] = "draw",
        refresh: Literal["all", "reservoir"] = "all",
        epochs_per_iterate: int = 1,
        schedule_epochs: int | None = None,
        activation_checkpointing: bool = False,
        packing: Packing = "auto",
        fused_lora: bool = True,
        torch_compile: bool = False,
        max_skipped_batches: int = 0,
        generation: GenerationSettings | dict[str, Any] | None = None,
    ) -> None:
        """Keep the settings; weights are loaded by `configure_model`."""
        super().__init__()
        if not isinstance(generation, GenerationSettings):
            generation = GenerationSettings.of(generation or {})
        # Plain values only: anything else breaks a weights_only resume.
        self.save_hyperparameters(ignore=["generation", *self.without])
        self.save_hyperparameters({"generation": asdict(generation)})
        check_choices(self)
        self.base = FrozenBase(model, revision, quantization, compute_dtype, trust_remote_code)
        self.lora = lora_settings(
            lora_r, lora_alpha, lora_dropout, lora_target_modules, initial_adapter
        )
        self.initial_adapter = initial_adapter
        self.beta = beta
        self.loss = loss
        self.learning_rate = learning_rate
        self.optimizer_name = optimizer
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_ratio = warmup_ratio
        self.real_nll_weight = real_nll_weight or 0.0
        self.rows = rows
        self.refresh = refresh
        self.epochs_per_iterate = epochs_per_iterate
        self.schedule_epochs = epochs_per_iterate if schedule_epochs is None else schedule_epochs
        self.activation_checkpointing = activation_checkpointing
        self.packing = packing
        self.fused_lora = fused_lora
        self.torch_compile = torch_compile
        self.max_skipped_batches = max_skipped_batches
        self.skipped_batches = 0
        self.generation = generation
        self.iterate = 0
        self._half_step: Mapping[str, Tensor] = {}
        self.val_metrics = PairMetrics()
        self._check_ranges()

    # ------------------------------------------------------------------ what a variant says

    @abstractmethod
    def opponent(self, t: int) -> Mixture | None:
        """Who writes the generated responses while p_{t+1} is trained; None: nobody does."""

    @abstractmethod
    def reference(self, t: int) -> Reference:
        """What log-ratios are taken against while p_{t+1} is trained."""

    def objective(self, logps: PairLogps) -> Tensor:
        """The scalar that is minimized: the mean of `loss` over the margins of the batch."""
        assert self.loss is not None
        return losses.by_name(self.loss)(logps.margin, self.reward_scale).mean()

    def anchored_objective(self, logps: PairLogps) -> Tensor:
        """The objective and, where it has weight, the anchor on the real responses."""
        loss = self.objective(logps)
        if not self.real_nll_weight:
            return loss
        return loss + self.real_nll_weight * losses.real_nll(logps.policy_real, logps.real_lengths)

    # ------------------------------------------------------------------ what the loop asks

    @property
    def reward_scale(self) -> float:
        """beta of the iterate that is being trained; 1 for a variant without beta."""
        return 1.0 if self.beta is None else at_iterate(self.beta, self.iterate)

    def rows_per_sample(self, t: int) -> int:
        """Rows that one sample of an example has while p_{t+1} is trained."""
        return rows_per_sample(self.opponent(t), union=self.rows == "union")

    def check_trainer(self) -> int:
        """Check what is said per iterate, and what self-play needs of the Trainer.

        Returns:
            The number of iterates that are to be played.

        Raises:
            SettingError: A trainer setting under which iterates cannot be played, a list with
                another number of values than there are iterates, a reference whose normalizer does
                not cancel, or rows that would be kept though another opponent drew them.
        """
        iterates = iterates_to_play(self.trainer, self.epochs_per_iterate)
        for name in self.per_iterate:
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != iterates:
                raise SettingError(
                    name,
                    values,
                    f"it has {len(values)} values for {iterates} iterates "
                    f"(max_epochs / epochs_per_iterate)",
                    fix=f"give one value, or a list of {iterates}",
                )
        check_opponents(
            type(self).__name__,
            [self.opponent(t) for t in range(iterates)],
            [self.reference(t) for t in range(iterates)],
            normalizer_cancels=self.normalizer_cancels,
            keeps_rows=self.refresh == "reservoir",
        )
        return iterates

    def check_model(self) -> None:
        """Check what can be checked about model and adapter before weights are read.

        Raises:
            SettingError: No such model, one that cannot be quantized or run as `packing` says, or
                an adapter that does not fit.
        """
        pretrained.check_playable(self.base)
        pretrained.check_quantizable(self.base)
        shares_prefixes(self.base, self.packing)
        check_adapter(self.base, self.lora, self.initial_adapter)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return pretrained.load_tokenizer(self.base)

    @property
    def vocabulary(self) -> int:
        """Number of ids that the model has embeddings for."""
        return int(pretrained.load_config(self.base).get_text_config().vocab_size)

    @property
    def context_length(self) -> int:
        """Longest sequence, in tokens, that the model was made for."""
        return pretrained.context_length(self.base)

    @property
    def generation_stop_ids(self) -> int | list[int] | None:
        """The stop ids that the model's own generation config names."""
        return pretrained.generation_stop_ids(self.base)

    def fingerprint_fields(self, t: int) -> dict[str, Any]:
        """What must stay the same for iterates up to t to be those of the same run."""
        settings = {
            name: value
            for name, value in self.hparams.items()
            if not name.startswith("_") and name not in _NOT_COMPARED
        }
        sampling = {"temperature", "top_p", "top_k", "unit_size"}
        return settings | {
            "variant": f"{type(self).__module__}.{type(self).__qualname__}",
            "compute_dtype": str(self.base.dtype).removeprefix("torch."),
            **{name: self._values(name, t) for name in self.per_iterate},
            "base_files": pretrained.content_hashes(self.base),
            "initial_adapter": self.initial_adapter
            and folder_hashes(Path(self.initial_adapter), (".safetensors", ".json")),
            **{n: v for n, v in asdict(self.generation).items() if n in sampling},
        }

    # ------------------------------------------------------------------ Lightning's hooks

    def configure_callbacks(self) -> list[Callback]:
        """Bring the self-play loop along, unless the trainer already has one."""
        from spin_lightning.callbacks.self_play import SelfPlay

        trainer: Any = self.trainer
        present = any(isinstance(callback, SelfPlay) for callback in trainer.callbacks)
        return [] if present else [SelfPlay()]

    def configure_model(self) -> None:
        """Load the policy; a second call does nothing."""
        if "policy" not in self._modules:
            self.policy = self.make_policy()

    def make_policy(self) -> Policy:
        """Build the policy on the device where training runs."""
        model_type = pretrained.load_config(self.base).model_type
        shared = shares_prefixes(self.base, self.packing)
        rank_zero_info(
            f"packing: {'shared' if shared else 'padded'} ({model_type!r}, packing={self.packing})"
        )
        return LoraPolicy(
            self.base,
            self.lora,
            self.initial_adapter,
            self.activation_checkpointing,
            device=self._trainer.strategy.root_device if self._trainer else "cpu",
            seed=global_seed(),
            packing=self.packing,
            fused=self.fused_lora,
            compiled=self.torch_compile,
        )

    def make_generator(
        self, stop_ids: tuple[int, ...], pad_id: int, settings: GenerationSettings
    ) -> Generator:
        """Build the engine that samples responses.

        Args:
            stop_ids: Ids that end a response.
            pad_id: Id that fills a batch up.
            settings: How responses are sampled.
        """
        config = pretrained.load_config(self.base)
        return LocalGenerator(config, stop_ids, pad_id, settings)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """A fresh optimizer and schedule for the iterate at hand."""
        optimizer = make_optimizer(
            self.optimizer_name,
            [parameter for _, parameter in self.policy.trainable()],
            at_iterate(self.learning_rate, self.iterate),
            self.weight_decay,
        )
        steps = self._steps_per_epoch() * self.schedule_epochs
        schedule = make_schedule(self.schedule, optimizer, steps, self.warmup_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def pair_logps(self, batch: PairBatch) -> PairLogps:
        """Score a batch with the policy; the reference's scores came with the rows."""
        logps = self.policy.prompt_logps(batch.pairs)
        # One column for the real responses, and a second where there are generated ones.
        by_side = logps.view(len(batch), -1).unbind(dim=-1)
        lengths = logps.new_tensor(batch.pairs.response_lengths).long().unbind(dim=-1)
        paired = len(by_side) > 1
        return PairLogps(
            policy_real=by_side[0],
            policy_generated=by_side[1] if paired else None,
            reference_real=batch.reference_real,
            reference_generated=batch.reference_generated,
            real_lengths=lengths[0],
            generated_lengths=lengths[1] if paired else None,
        )

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """One step on a batch of pairs."""
        logps = self.pair_logps(batch)
        loss = self.anchored_objective(logps)
        if self.max_skipped_batches:
            self.log("train/skipped_batches", float(self.skipped_batches))
        if leaves_out(self, batch, logps, loss):
            return no_gradient(self)
        statistics = {n: s.mean for n, s in pair_statistics(logps, self.reward_scale).items()}
        statistics["loss"] = loss.detach()
        if self.loss == "exponential":
            overflows = losses.overflows(logps.margin.detach(), self.reward_scale)
            statistics["overflows"] = overflows.double()
        self.log_dict({f"train/{name}": v for name, v in statistics.items()}, batch_size=len(batch))
        self.log("train/learning_rate", self._learning_rate_now())
        self.log(
            "train/loss_epoch",
            loss,
            on_step=False,
            on_epoch=True,
            batch_size=len(batch),
            sync_dist=True,
        )
        if batch_idx == 0 and self.current_epoch % self.epochs_per_iterate == 0:
            self._log_first_margin(logps)
        return loss * self._rank_share(batch_idx)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Add a batch of held-out pairs to the validation metrics."""
        if not self._rank_share(batch_idx, held_out=True):
            # Nothing was left for this rank; what it got instead another one counts.
            return
        logps = self.pair_logps(batch)
        self.val_metrics.update(logps, self.reward_scale, self.anchored_objective(logps))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        # (They are those of all ranks already.)
        metrics = {f"val/{name}": v for name, v in self.val_metrics.compute().items()}
        self.log_dict(metrics, sync_dist=True)
        self.val_metrics.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained adapter and which iterate it is on its way to; drop the base.

        Raises:
            NotFiniteError: The adapter has weights that are no numbers.
        """
        check_weights(self)
        trained = {f"policy.{name}" for name, _ in self.policy.trainable()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trained}
        checkpoint["self_play"] = {
            "iterate": self.iterate,
            "gradients": self._gradients(),
            "skipped_batches": self.skipped_batches,
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take up the iterate; the weights follow.

        Raises:
            RunFolderError: The checkpoint was taken inside a step of several processes.
        """
        self.configure_model()
        self.iterate = checkpoint["self_play"]["iterate"]
        self.skipped_batches = checkpoint["self_play"].get("skipped_batches", 0)
        gradients = checkpoint["self_play"].get("gradients", {})
        if gradients is None:
            raise RunFolderError(
                "the checkpoint was taken while several processes accumulated gradients, of which "
                "each had its own",
                fix="resume from the run's checkpoints/last.ckpt, which lies between two steps",
            )
        self._half_step = gradients

    def on_train_start(self) -> None:
        """Take up the gradients of a step that was half done."""
        for name, parameter in self.policy.trainable():
            if name in self._half_step:
                parameter.grad = self._half_step[name].to(parameter)
        self._half_step = {}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the trained adapter, which is all that a checkpoint holds.

        Raises:
            RunFolderError: The checkpoint holds another adapter, or not all of it.
        """
        trained = {f"policy.{name}" for name, _ in self.policy.trainable()}
        if strict and trained != set(state_dict):
            raise RunFolderError(
                f"the checkpoint holds another adapter: {len(trained ^ set(state_dict))} names "
                f"differ, such as {min(trained ^ set(state_dict))}",
                fix="use the model and the lora_* settings that the checkpoint was made with",
            )
        shapes = {f"policy.{name}": weight.shape for name, weight in self.policy.trainable()}
        odd = [n for n, shape in shapes.items() if n in state_dict and state_dict[n].shape != shape]
        if odd:
            raise RunFolderError(
                f"the checkpoint holds another adapter: {len(odd)} shapes differ, such as {odd[0]}",
                fix="use the model and the lora_* settings that the checkpoint was made with",
            )
        keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        # The base's keys are not missing: they come from its own files.
        return type(keys)([], [])

    # ------------------------------------------------------------------ details

    def _values(self, name: str, t: int) -> list[float] | None:
        value = getattr(self, name)
        return None if value is None else [at_iterate(value, i) for i in range(t)]

    def _steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, from numbers alone: there are no rows yet to ask for."""
        trainer: Any = self.trainer
        batches = trainer.datamodule.batches_per_epoch(self.iterate, trainer.world_size)
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return max(1, math.ceil(batches / trainer.accumulate_grad_batches))

    def _gradients(self) -> dict[str, Tensor] | None:
        """Gradients that a half done step has accumulated; None where they differ by rank."""
        trainer: Any = self.trainer
        if not trainer.fit_loop._should_accumulate():
            return {}
        if trainer.world_size > 1:
            return None
        return {n: p.grad for n, p in self.policy.trainable() if p.grad is not None}

    def _rank_share(self, batch_idx: int, *, held_out: bool = False) -> float:
        """What this rank's loss weighs in the mean over ranks; 1 but for an uneven last batch."""
        trainer: Any = self.trainer
        if trainer.world_size == 1:
            return 1.0
        share = trainer.datamodule.rank_share(self.iterate, batch_idx, held_out=held_out)
        return float(share)

    def _learning_rate_now(self) -> float:
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])

    def _log_first_margin(self, logps: PairLogps) -> None:
        """Log how far the first margin is from 0, which it is where policy and reference agree."""
        reference = self.reference(self.iterate)
        agree = reference.plain_members == (self.iterate,) and not reference.token_members
        if logps.policy_generated is None or not agree:
            return
        assert logps.generated_lengths is not None
        margin = logps.margin.detach().abs()
        tokens = logps.real_lengths + logps.generated_lengths
        values = {
            "train/first_margin_abs": float(margin.max()),
            "train/first_margin_abs_per_token": float((margin / tokens).max()),
        }
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)
        if values["train/first_margin_abs"] > _MARGIN_ALARM:
            self.print(
                f"Warning: the first margin of iterate {self.iterate + 1} is "
                f"{values['train/first_margin_abs']:.3g} nats and should be 0: training and "
                "scoring disagree (low precision, or LoRA dropout)."
            )

    def _check_ranges(self) -> None:
        def every(value: float | list[float] | None) -> list[float]:
            return value if isinstance(value, list) else [] if value is None else [value]

        for name in ("beta", "loss"):
            if getattr(self, name) is None and name not in self.without:
                raise SettingError(
                    name,
                    None,
                    f"{type(self).__name__} needs one",
                    fix="give a value, or leave it out",
                )
        checks = {
            "beta": (
                all(is_number(b) and b > 0 for b in every(self.beta)),
                "values > 0; 0.1 is SPIN's",
            ),
            "learning_rate": (
                all(is_number(rate) and rate > 0 for rate in every(self.learning_rate)),
                "values > 0",
            ),
            "warmup_ratio": (
                is_number(self.warmup_ratio) and 0 <= self.warmup_ratio <= 1,
                "a share between 0 and 1",
            ),
            "epochs_per_iterate": (is_whole(self.epochs_per_iterate, 1), "a whole number >= 1"),
            "schedule_epochs": (
                is_whole(self.schedule_epochs, self.epochs_per_iterate),
                f"at least epochs_per_iterate ({self.epochs_per_iterate})",
            ),
            "weight_decay": (
                is_number(self.weight_decay) and self.weight_decay >= 0,
                "a number >= 0",
            ),
            "max_skipped_batches": (is_whole(self.max_skipped_batches, 0), "a whole number >= 0"),
            "real_nll_weight": (
                is_number(self.real_nll_weight) and self.real_nll_weight >= 0,
                "a number >= 0; 0 for no anchor",
            ),
        }
        for name, (valid, fix) in checks.items():
            if not valid:
                raise SettingError(name, getattr(self, name), "out of range", fix=f"give {fix}")
