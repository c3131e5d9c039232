"""Values that are passed between the parts of the library, all immutable, and their interfaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Message(TypedDict, total=False):
    """One turn of a chat as templates take it; the data may have further keys."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    reasoning_content: str
    reasoning: str
    thinking: str


class PolicyId(NamedTuple):
    """Names a frozen policy: iterate i itself, or its token-level mixture with the base.

    Attributes:
        iterate: Index i of the iterate.
        token_alpha: Weight of the base at every token; 0 for p_i itself.
    """

    iterate: int
    token_alpha: float = 0.0

    @property
    def mixes_base(self) -> bool:
        """Whether the base is mixed in at every token; mixed with iterate 0 it changes nothing."""
        return self.token_alpha > 0 and self.iterate != 0

    @property
    def lanes(self) -> int:
        """Lanes of a model's batch that a row takes: with the base mixed in, two."""
        return 2 if self.mixes_base else 1


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example as text.

    Attributes:
        example_id: Position of the example in its source, from 0.
        prompt: The turns before the response; a plain prompt is a single user turn.
        response: The response of the data set ("real").
        reasoning: The thought before the response, where the data have it apart.
        tool_calls: Tool calls of the response.
        tools: Schemas of the tools that the whole conversation may call.
    """

    example_id: int
    prompt: tuple[Message, ...]
    response: str
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """An example that cannot be used, and why.

    Attributes:
        example_id: Position of the example in its source, from 0.
        reason: Why; after a colon, details of the row.
        prompt_tokens: Length of its prompt, where that is the reason.
    """

    example_id: int
    reason: str
    prompt_tokens: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized example.

    Attributes:
        example_id: Position of the example in its source, from 0.
        prompt_ids: Ids of the prompt, exactly as the opponents see them.
        real_ids: Ids of the real response, stop id included, or its first ids up to the cap.
        real_finished: Whether `real_ids` ends with a stop id.
    """

    example_id: int
    prompt_ids: tuple[int, ...]
    real_ids: tuple[int, ...]
    real_finished: bool

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The real response without its stop id."""
        return self.real_ids[:-1] if self.real_finished else self.real_ids

    @property
    def stop_id(self) -> int | None:
        """The stop id of the real response; None if it is cut."""
        return self.real_ids[-1] if self.real_finished else None


@dataclass(frozen=True, slots=True)
class Row:
    """One synthetic row, as stored in parquet.

    Attributes:
        example_id: The example that it was made from.
        sample: Index of the sample among those of the example, from 0.
        prompt_ids: Ids of the prompt.
        real_ids: Ids of the real response.
        generated_ids: Ids of the generated response; empty if the method uses none.
        opponent: Iterate i with y' ~ p_i; None where there is no generated response.
        finished: Whether `generated_ids` ends with a stop id.
        real_finished: Whether `real_ids` does.
        members: Iterates whose log-probs are stored, ascending.
        member_real_logps: log p_i(y|x) of each member, nats, by teacher forcing at temperature 1.
        member_generated_logps: log p_i(y'|x), likewise.
        token_alpha: Base weight of a token-level mixture; None without one.
        token_members: Members of the token-level mixture.
        token_real_logps: log g_i(y|x) of each of them.
        token_generated_logps: log g_i(y'|x), likewise.
        seed: The row's 64-bit key.
    """

    example_id: int
    sample: int
    prompt_ids: tuple[int, ...]
    real_ids: tuple[int, ...]
    generated_ids: tuple[int, ...]
    opponent: int | None
    finished: bool
    real_finished: bool
    members: tuple[int, ...]
    member_real_logps: tuple[float, ...]
    member_generated_logps: tuple[float, ...]
    token_alpha: float | None
    token_members: tuple[int, ...]
    token_real_logps: tuple[float, ...]
    token_generated_logps: tuple[float, ...]
    seed: int


@dataclass(frozen=True)
class SequenceBatch:
    """Left-padded sequences [prompt, response]: every response ends in the last column.

    Attributes:
        input_ids: int64, shape [n, length].
        attention_mask: 1 where a column holds a token, int64, shape [n, length].
        response_lengths: Number of response tokens of each sequence, int64, shape [n].
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_lengths: Tensor

    def to(self, device: torch.device | str) -> SequenceBatch:
        """Return a copy on `device`."""
        return SequenceBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class PromptBatch:
    """Prompts, each followed by its responses, in one row without padding.

    Prompt by prompt: [prompt, response, response, …]. Each prompt occurs once, whatever the number
    of its responses, which do not attend to each other.

    Attributes:
        input_ids: int64, shape [tokens].
        prompt_lengths: Number of tokens of each prompt.
        response_lengths: Number of tokens of each of its responses.
        is_one_pass: Whether one forward pass is to compute all of it.
    """

    input_ids: Tensor
    prompt_lengths: tuple[int, ...]
    response_lengths: tuple[tuple[int, ...], ...]
    is_one_pass: bool = False

    def to(self, device: torch.device | str) -> PromptBatch:
        """Return a copy on `device`."""
        return replace(self, input_ids=self.input_ids.to(device))

    @property
    def flat_lengths(self) -> list[int]:
        """Number of tokens of every response, in order."""
        return [length for lengths in self.response_lengths for length in lengths]


@dataclass(frozen=True)
class PairBatch:
    """Input of one training or validation step.

    Attributes:
        pairs: n prompts, each with its real response, then the generated one if the method uses
            one, then the one of iterate 0 if it uses that.
        reference_real: log R(y|x), nats, float64, shape [n].
        reference_generated: log R(y'|x), likewise; None without generated responses.
        row_ids: Example and sample of each pair; empty if unknown.
        further_real: log R_j(y|x) of k further references, shape [n, k]; None without any.
        further_generated: log R_j(y'|x), likewise.
    """

    pairs: PromptBatch
    reference_real: Tensor
    reference_generated: Tensor | None
    row_ids: tuple[tuple[int, int], ...] = ()
    further_real: Tensor | None = None
    further_generated: Tensor | None = None

    def to(self, device: torch.device | str) -> PairBatch:
        """Return a copy on `device`."""
        return self._with(self.pairs.to(device), lambda values: values.to(device))

    def split(self, passes: Sequence[PromptBatch]) -> list[PairBatch]:
        """The pairs of each of some consecutive parts of `pairs`."""
        batches, start = [], 0
        for part in passes:
            own = slice(start, start := start + len(part.prompt_lengths))
            batch = self._with(part, itemgetter(own))
            batches.append(replace(batch, row_ids=self.row_ids[own]))
        return batches

    def _with(self, pairs: PromptBatch, change: Callable[[Tensor], Tensor]) -> PairBatch:
        """Other pairs, and a change of all log-probs."""

        def changed(column: Tensor | None) -> Tensor | None:
            return None if column is None else change(column)

        return replace(
            self,
            pairs=pairs,
            reference_real=change(self.reference_real),
            reference_generated=changed(self.reference_generated),
            further_real=changed(self.further_real),
            further_generated=changed(self.further_generated),
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.reference_real)


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs of the responses of a batch of pairs, nats, each of shape [n].

    Attributes:
        policy_real: log p_theta(y|x), with gradient.
        policy_generated: log p_theta(y'|x), with gradient.
        reference_real: log R(y|x).
        reference_generated: log R(y'|x).
        real_lengths: Number of response tokens of y.
        generated_lengths: Number of response tokens of y'.
        policy_first: log p_theta(y0|x), with gradient, of the response y0 of iterate 0.
        further_real: log R_j(y|x) of k further references, shape [n, k].
        further_generated: log R_j(y'|x), likewise.
    """

    policy_real: Tensor
    policy_generated: Tensor | None
    reference_real: Tensor
    reference_generated: Tensor | None
    real_lengths: Tensor
    generated_lengths: Tensor | None
    policy_first: Tensor | None = None
    further_real: Tensor | None = None
    further_generated: Tensor | None = None

    @classmethod
    def of(cls, batch: PairBatch, logps: Tensor) -> PairLogps:
        """Combine a batch with the policy's log-probs of its responses.

        Args:
            batch: n pairs.
            logps: log p_theta of every response, in the order of `batch.pairs`, nats, shape
                [responses].
        """
        # A column for the real responses, one if there are generated ones, one for iterate 0's.
        by_side = logps.view(len(batch), -1).unbind(dim=-1)
        lengths = logps.new_tensor(batch.pairs.response_lengths).long().unbind(dim=-1)
        paired = len(by_side) > 1
        return cls(
            policy_real=by_side[0],
            policy_generated=by_side[1] if paired else None,
            reference_real=batch.reference_real,
            reference_generated=batch.reference_generated,
            real_lengths=lengths[0],
            generated_lengths=lengths[1] if paired else None,
            policy_first=by_side[2] if len(by_side) > 2 else None,
            further_real=batch.further_real,
            further_generated=batch.further_generated,
        )

    @property
    def real_log_ratio(self) -> Tensor:
        """log p_theta(y|x) - log R(y|x), shape [n]."""
        return self.policy_real - self.reference_real

    @property
    def generated_log_ratio(self) -> Tensor:
        """log p_theta(y'|x) - log R(y'|x), shape [n].

        Raises:
            TypeError: The rows hold no generated responses.
        """
        if self.policy_generated is None or self.reference_generated is None:
            raise TypeError("these rows hold no generated responses")
        return self.policy_generated - self.reference_generated

    @property
    def margin(self) -> Tensor:
        """real_log_ratio - generated_log_ratio, before beta, shape [n]."""
        return self.real_log_ratio - self.generated_log_ratio


class Density(Protocol):
    """A density of responses that is a function of the stored log-probs of its members."""

    def logps(
        self, member_logps: Mapping[int, Tensor], token_logps: Mapping[int, Tensor], /
    ) -> Tensor:
        """Log-density of responses, nats, shape [...].

        Args:
            member_logps: log p_i(y|x) of each plain member, nats, each of shape [...].
            token_logps: log g_i(y|x) of each token-level member, likewise.
        """


class ModuleForData(Protocol):
    """What the data module uses of the module in training."""

    @property
    def iterate(self) -> int:
        """Index t of the newest iterate; p_{t+1} is in training."""

    @property
    def refresh(self) -> str:
        """`all`, or `reservoir` if rows of earlier iterates are kept."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""

    @property
    def vocabulary(self) -> int:
        """Number of ids that the model has embeddings for."""

    @property
    def context_length(self) -> int:
        """Longest sequence that the model supports, in tokens."""

    @property
    def generation_stop_ids(self) -> int | list[int] | None:
        """The stop ids in the model's generation config."""

    def check_trainer(self) -> int:
        """Check the Trainer's settings; return the number of iterates to play."""

    def check_model(self) -> None:
        """Check model and adapter before weights are read."""

    @property
    def uses_first_responses(self) -> bool:
        """Whether the response that iterate 0 gave is part of every pair."""

    def rows_per_sample(self, t: int) -> int:
        """Rows per sample of an example while p_{t+1} is trained."""

    def reference(self, t: int) -> Density:
        """The denominator of log-ratios while p_{t+1} is trained."""

    def further_references(self, t: int) -> Sequence[Density]:
        """Further densities whose log-probs the objective gets."""


class DataForModule(Protocol):
    """What the module in training uses of the data module."""

    def batches_per_epoch(self, t: int, world_size: int) -> int:
        """Number of batches that each rank gets in an epoch on the rows of iterate t."""

    def rank_share(self, t: int, batch_idx: int, *, held_out: bool = False) -> float:
        """Weight of this rank's batch mean in the mean over all ranks."""

    def window_share(self, t: int, batch_idx: int, batches: int, limit: int) -> float:
        """Weight of a batch in the mean over the batches of its optimizer step."""

    def rows_folder(self, t: int) -> Path:
        """Folder of the training rows of iterate t."""
