"""The self-play module: everything that the variants share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, device
from transformers import PreTrainedTokenizerBase

from spin_lightning import losses
from spin_lightning.generation.base import Generator
from spin_lightning.generation.engines import make_engine
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.keyed import global_seed
from spin_lightning.metrics import PairMetrics
from spin_lightning.mixtures import Mixture, Reference
from spin_lightning.modules import checkpointing, checks, pass_by_pass, skipping
from spin_lightning.modules.epoch_loss import EpochLoss
from spin_lightning.modules.settings import at_iterate, check_choices, check_ranges, values_before
from spin_lightning.modules.step_log import log_first_margin, log_step
from spin_lightning.modules.trainer_access import (
    callbacks_of,
    rank_share,
    step_share,
    steps_per_epoch,
)
from spin_lightning.out_of_memory import enough_memory
from spin_lightning.policies.base import Policy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.optimizers import (
    OptimizerName,
    ScheduleName,
    make_optimizer,
    make_schedule,
)
from spin_lightning.policies.pretrained import ComputeDtype, FrozenBase, Quantization
from spin_lightning.policies.shared_prefix import Packing
from spin_lightning.policies.spec import PolicySpec
from spin_lightning.rows.plan import rows_per_sample
from spin_lightning.types import PairBatch, PairLogps

_SMALLER_OPTIMIZER = (
    "set model.optimizer: adamw_8bit, a smaller model.lora_r, or model.quantization: nf4"
)


class SelfPlayModule(L.LightningModule, ABC):
    """Trains a policy to prefer the data set's responses over those of an opponent.

    A variant returns three things: the mixture that generates (`opponent`), the denominator of
    log-ratios (`reference`), and the scalar to minimize (`objective`, default the mean of `loss`
    over the pairs of the batch). The `SelfPlay` callback runs the loop around it.

    Args:
        model: Hub id, folder or GGUF file of a causal language model, or smollm2; it stays frozen.
        quantization: Store the frozen weights in 4 bits (nf4), in 8 bits (int8), or unquantized.
        compute_dtype: Precision to compute in; auto: bfloat16 on GPUs from Ampere on, else float32.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Allow code that comes with the model to run.
        lora_r: Rank of the adapter; default 16.
        lora_alpha: LoRA's scaling numerator; default 32.
        lora_dropout: Dropout before the adapter; default 0, with which first margins are exactly 0.
        lora_target_modules: Layers that get an adapter; default all-linear.
        initial_adapter: Folder of a LoRA adapter to start from, such as the result of SFT. It
            becomes iterate 0, and its config replaces every lora_* setting.
        beta: Temperature of the implicit reward (SPIN's lambda); one value or one per iterate.
        loss: Loss of a pair: of the margin, or sppo, of both log-ratios.
        learning_rate: Peak learning rate; one value or one per iterate.
        optimizer: adamw, rmsprop (as in SPIN's scripts), or adamw_8bit.
        weight_decay: Weight decay of the adapter.
        schedule: Shape of the learning rate after warm-up.
        warmup_ratio: Warm-up as a share of the schedule's steps.
        real_nll_weight: Weight of an anchor added to the objective: the negative log-likelihood per
            token of the real responses, averaged over examples; 0 for none.
        rows: draw: one row per sample, its opponent drawn from the mixture; union: one row per
            sample and member of the mixture.
        refresh: all: regenerate all rows for every iterate; reservoir: keep rows of the previous
            iterate where the opponent's weights allow.
        epochs_per_iterate: Passes over an iterate's rows.
        schedule_epochs: Length of the schedule in epochs; default epochs_per_iterate. SPIN's
            published "2 of 6 epochs" is 2 and 6.
        activation_checkpointing: Recompute activations in the backward pass to save memory.
        packing: shared: compute a prompt once for both of its responses; padded: once for each;
            auto: shared for the architectures that it is tested on, padded for others.
        fused_lora: Use the fused pass for LoRA layers that support it, instead of PEFT's own.
        torch_compile: Compile the layers for training, which makes the first steps take minutes.
            Generation and scoring run uncompiled.
        shard_base: Let each process hold a part of a base that does not fit one card (slow).
        max_skipped_batches: Batches of a run that may be skipped for a NaN or infinite loss or
            log-prob; 0 stops at the first. Their rows are written to a file in either case.
        generation: How opponents' responses are sampled.

    Raises:
        SettingError: A value is out of range, or lora_* is given together with initial_adapter.
    """

    # Settings that may be a list with one value per iterate.
    per_iterate: ClassVar[tuple[str, ...]] = ("beta", "learning_rate")
    # Whether each pair also holds the response that iterate 0 gave (`PairLogps.policy_first`).
    uses_first_responses: ClassVar[bool] = False
    # Settings that a variant does not have; it passes None for them.
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
        shard_base: bool = False,
        max_skipped_batches: int = 0,
        generation: GenerationSettings | dict[str, Any] | None = None,
    ) -> None:
        """Keep the settings. `configure_model` loads the weights."""
        super().__init__()
        if not isinstance(generation, GenerationSettings):
            generation = GenerationSettings.of(generation or {})
        # Plain values only: anything else breaks a weights_only resume.
        self.save_hyperparameters(ignore=["generation", *self.without])
        self.save_hyperparameters({"generation": asdict(generation)})
        check_choices(self)
        self.policy_spec = PolicySpec(
            FrozenBase(model, revision, quantization, compute_dtype, trust_remote_code),
            LoraSettings.of(lora_r, lora_alpha, lora_dropout, lora_target_modules, initial_adapter),
            initial_adapter=initial_adapter,
            activation_checkpointing=activation_checkpointing,
            packing=packing,
            fused_lora=fused_lora,
            torch_compile=torch_compile,
            shard_base=shard_base,
        )
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
        self.max_skipped_batches = max_skipped_batches
        self.generation = generation
        self.val_metrics = PairMetrics()
        self._start_over()
        check_ranges(self)

    def _start_over(self) -> None:
        """Set the state of training to its start."""
        self.iterate = 0
        self.skipped_batches = skipping.SkippedBatches(self.max_skipped_batches)
        self.epoch_loss = EpochLoss()
        self._open_gradients: Mapping[str, Tensor] = {}
        self.was_fitted = False  # whether SelfPlay may have changed the weights
        self.needs_whole_batches = False  # whether the objective is not a mean over pairs
        self.val_metrics.reset()

    # ------------------------------------------------------------------ what a variant defines

    @abstractmethod
    def opponent(self, t: int) -> Mixture | None:
        """The mixture that generates responses while p_{t+1} is trained; None to generate none."""

    @abstractmethod
    def reference(self, t: int) -> Reference:
        """The denominator of log-ratios while p_{t+1} is trained."""

    def further_references(self, t: int) -> Sequence[Mixture]:
        """Densities whose log-probs the objective also gets (`PairLogps.further_real`)."""
        return ()

    @property
    def normalizer_cancels(self) -> bool:
        """Whether the objective depends on the margin alone, where a normalizer of R cancels."""
        return self.loss is None or losses.depends_on_margin(self.loss)

    def objective(self, logps: PairLogps) -> Tensor:
        """The scalar to minimize: the mean of `loss` over the pairs of the batch."""
        assert self.loss is not None
        loss = losses.of_pairs(self.loss)
        return loss(logps.real_log_ratio, logps.generated_log_ratio, self.reward_scale).mean()

    # ------------------------------------------------------------------ policy and generator

    def make_policy(self) -> Policy:
        """Build the policy on the device where training runs."""
        rank_zero_info(f"packing: {self.policy_spec.packing_in_use}")
        return self.policy_spec.on(self._root_device).build(self._root_device, global_seed())

    @property
    def _root_device(self) -> device:
        return self._trainer.strategy.root_device if self._trainer else device("cpu")

    def make_generator(
        self, stop_ids: tuple[int, ...], pad_id: int, settings: GenerationSettings
    ) -> Generator:
        """Build the engine that samples responses, for rows and for benchmarks alike."""
        return make_engine(stop_ids, pad_id, settings, self.generation)

    def check_model(self) -> None:
        """Check all that can be checked about model and adapter before weights are read."""
        self.policy_spec.check()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.policy_spec.tokenizer

    @property
    def vocabulary(self) -> int:
        """Number of ids that the model has embeddings for."""
        return self.policy_spec.vocabulary

    @property
    def context_length(self) -> int:
        """Longest sequence that the model supports, in tokens."""
        return self.policy_spec.context_length

    @property
    def generation_stop_ids(self) -> int | list[int] | None:
        """The stop ids in the model's generation config."""
        return self.policy_spec.generation_stop_ids

    # ------------------------------------------------------------------ iterates

    @property
    def reward_scale(self) -> float:
        """beta of the iterate in training; 1 for a variant without beta."""
        return 1.0 if self.beta is None else at_iterate(self.beta, self.iterate)

    def rows_per_sample(self, t: int) -> int:
        """Rows per sample of an example while p_{t+1} is trained."""
        return rows_per_sample(self.opponent(t), union=self.rows == "union")

    def check_trainer(self) -> int:
        """Check the Trainer's settings, and the settings and opponents of every iterate.

        Returns:
            The number of iterates to play.

        Raises:
            SettingError: Settings of the Trainer, a list's length, the opponents and references
                or the number of processes do not fit.
        """
        iterates = checks.iterates_to_play(self.trainer, self.epochs_per_iterate)
        self.policy_spec.check_processes(self.trainer.world_size)
        checks.check_per_iterate({name: getattr(self, name) for name in self.per_iterate}, iterates)
        checks.check_variant(self, iterates)
        return iterates

    def fingerprint_fields(self, t: int) -> dict[str, Any]:
        """The settings and files that iterates up to t of the same run have in common."""
        excluded = self.policy_spec.not_compared | {"generation", "max_skipped_batches"}
        return {
            **{
                name: value
                for name, value in self.hparams.items()
                if not name.startswith("_") and name not in excluded
            },
            "variant": f"{type(self).__module__}.{type(self).__qualname__}",
            **{name: values_before(getattr(self, name), t) for name in self.per_iterate},
            **self.policy_spec.on(self._root_device).fingerprint_fields(),
            **self.generation.fingerprint_fields(),
        }

    # ------------------------------------------------------------------ training

    def configure_callbacks(self) -> list[Callback]:
        """Add the self-play loop and its progress, unless the trainer already has them."""
        from spin_lightning.callbacks.phase_progress import PhaseProgress
        from spin_lightning.callbacks.self_play import SelfPlay

        present = callbacks_of(self.trainer)
        # The loop first: it chooses the run folder.
        kinds: tuple[type[Callback], ...] = (SelfPlay, PhaseProgress)
        return [kind() for kind in kinds if not any(isinstance(one, kind) for one in present)]

    def configure_model(self) -> None:
        """Load the policy; further calls do nothing."""
        if "policy" not in self._modules:
            self.policy = self.make_policy()
            # DDP would send them from rank 0 to all, whose parts differ.
            names = [f"policy.{name}" for name in self.policy.sharded_names()]
            self._ddp_params_and_buffers_to_ignore = names

    def forget_earlier_fit(self) -> None:
        """Drop what another fit trained: a fit starts from the settings or from a checkpoint."""
        if self.was_fitted:
            self._modules.pop("policy", None)
            self._start_over()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build a fresh optimizer and schedule for the iterate in training."""
        optimizer = make_optimizer(
            self.optimizer_name,
            [parameter for _, parameter in self.policy.trainable()],
            at_iterate(self.learning_rate, self.iterate),
            self.weight_decay,
        )
        steps = steps_per_epoch(self.trainer, self.iterate) * self.schedule_epochs
        schedule = make_schedule(self.schedule, optimizer, steps, self.warmup_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the optimizer, whose state takes memory from the first one on.

        Raises:
            SpinError: There is not enough.
        """
        with enough_memory("the optimizer's step", _SMALLER_OPTIMIZER):
            super().optimizer_step(*args, **kwargs)

    def pair_logps(self, batch: PairBatch) -> PairLogps:
        """Score a batch with the policy; the reference's scores are stored with the rows."""
        return PairLogps.of(batch, self.policy.score(batch.pairs))

    def anchored_objective(self, logps: PairLogps) -> Tensor:
        """The objective, plus the weighted anchor on the real responses if there is one."""
        loss = self.objective(logps)
        if not self.real_nll_weight:
            return loss
        return loss + self.real_nll_weight * losses.real_nll(logps.policy_real, logps.real_lengths)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """One step on a batch of pairs."""
        logps, loss = pass_by_pass.score(self, batch)
        self.policy.serve_others()
        if self.max_skipped_batches:
            self.log("train/skipped_batches", float(self.skipped_batches.count))
        if skipping.is_non_finite(self.trainer, logps, loss):
            self._skip(batch, logps, loss)
            return skipping.zero_loss(self.policy)
        share = rank_share(self.trainer, self.iterate, batch_idx)
        log_step(self, logps, loss, share)
        if batch_idx == 0 and self.current_epoch % self.epochs_per_iterate == 0:
            log_first_margin(self, logps)
        return loss * step_share(self.trainer, self.iterate, batch_idx)

    def _skip(self, batch: PairBatch, logps: PairLogps, loss: Tensor) -> None:
        context = skipping.BatchContext(
            iterate=self.iterate,
            beta=self.reward_scale,
            decode=lambda ids: str(self.tokenizer.decode(list(ids))),
        )
        self.print(self.skipped_batches.skip(self.trainer, batch, logps, loss, context))

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Add a batch of held-out pairs to the validation metrics."""
        # A rank that has no rows left in the last batch repeats another rank's row.
        if rank_share(self.trainer, self.iterate, batch_idx, held_out=True):
            logps = self.pair_logps(batch)
            self.val_metrics.update(logps, self.reward_scale, self.anchored_objective(logps))
        self.policy.serve_others()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set, which are reduced over ranks already."""
        metrics = {f"val/{name}": v for name, v in self.val_metrics.compute().items()}
        self.log_dict(metrics, sync_dist=True)
        self.val_metrics.reset()

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained adapter and the state of self-play; drop the base.

        Raises:
            NonFiniteError: Weights of the adapter are NaN or infinite.
        """
        checkpointing.check_weights(self.policy, self.iterate)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = checkpointing.trained_state(self.policy, state)
        checkpoint["self_play"] = {
            "iterate": self.iterate,
            "gradients": checkpointing.accumulated_gradients(self.trainer, self.policy),
            "skipped_batches": self.skipped_batches.count,
            "epoch_loss": self.epoch_loss.state(self.trainer),
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore the state of self-play; Lightning then loads the weights.

        Raises:
            RunFolderError: The checkpoint was taken inside a step of several processes.
        """
        self.configure_model()
        state = checkpoint["self_play"]
        self.iterate = state["iterate"]
        self.skipped_batches.count = state.get("skipped_batches", 0)
        self._open_gradients = checkpointing.gradients_of(state)
        self.epoch_loss.restore(state.get("epoch_loss"), self._trainer)

    def on_train_start(self) -> None:
        """Restore the gradients of the step in which the checkpoint was taken."""
        checkpointing.restore_gradients(self.policy, self._open_gradients)
        self._open_gradients = {}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the trained adapter, which is all that a checkpoint holds.

        Raises:
            RunFolderError: The checkpoint holds another adapter, or a part of one.
        """
        checkpointing.check_state(self.policy, state_dict, strict=strict)
        keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        # The base's keys are not missing: they come from its own files.
        return type(keys)([], [])
