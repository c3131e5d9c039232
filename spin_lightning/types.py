"""The values that travel between the parts of the library. All frozen, all plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor


class Message(TypedDict, total=False):
    """One turn of a chat, in the form that chat templates take.

    Every message has a role and a content; the other fields are there where the data have them.
    """

    role: str
    content: str
    name: str
    tool_calls: Sequence[Mapping[str, Any]]
    tool_call_id: str
    tool_responses: Sequence[Mapping[str, Any]]
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
        """Whether the base takes part at every token; iterate 0 mixed with the base is the base."""
        return self.token_alpha > 0 and self.iterate != 0


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example as text.

    Attributes:
        example_id: Row of the source, counted from 0. Where a row gives several examples, those
            before the last one have larger numbers, see `data.numbering`.
        prompt: The turns before the response; a plain prompt is a single user turn.
        response: The response of the data set ("real"): the text of the assistant's turn. Empty
            only where the turn consists of tool calls.
        reasoning: The thought before the response, where the data keep it apart.
        tool_calls: The tool calls of the response.
        tools: Schemas of the tools offered in the conversation.
    """

    example_id: int
    prompt: tuple[Message, ...]
    response: str
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """An example that was left out, and why."""

    example_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized example.

    Attributes:
        example_id: Position of the example in its source, counted from 0.
        prompt_ids: Ids of the prompt, exactly as the opponents will see them.
        real_ids: Ids of the real response, up to and including its stop id, or its first
            ids up to the cap.
        real_finished: Whether `real_ids` ends with a stop id.
    """

    example_id: int
    prompt_ids: tuple[int, ...]
    real_ids: tuple[int, ...]
    real_finished: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One synthetic row, as it lies in parquet.

    Attributes:
        example_id: The example it was made from.
        sample: Which of the example's samples it is, from 0.
        prompt_ids: Ids of the prompt.
        real_ids: Ids of the real response.
        generated_ids: Ids of the generated response; empty where a method uses none.
        opponent: Iterate i with y' ~ p_i; None where there is no generated response.
        finished: Whether `generated_ids` ends with a stop id.
        real_finished: Whether `real_ids` does.
        members: Iterates whose log-probs follow, ascending.
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
        return SequenceBatch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            response_lengths=self.response_lengths.to(device),
        )


@dataclass(frozen=True)
class PromptBatch:
    """Prompts, each followed by its responses, in one row without padding.

    Prompt by prompt: [prompt, response, response, …]. Each prompt is there once, whatever the
    number of its responses, which do not see each other.

    Attributes:
        input_ids: int64, shape [tokens].
        prompt_lengths: Number of tokens of each prompt.
        response_lengths: Number of tokens of each of its responses.
    """

    input_ids: Tensor
    prompt_lengths: tuple[int, ...]
    response_lengths: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device | str) -> PromptBatch:
        """Return a copy on `device`."""
        return replace(self, input_ids=self.input_ids.to(device))

    @property
    def flat_lengths(self) -> list[int]:
        """Number of tokens of every response, in order."""
        return [length for lengths in self.response_lengths for length in lengths]


@dataclass(frozen=True)
class PairBatch:
    """What one training or validation step needs.

    Attributes:
        pairs: n prompts, each with its real response and then the generated one, where the method
            uses one.
        reference_real: log R(y|x), nats, float64, shape [n].
        reference_generated: log R(y'|x), likewise; None without generated responses.
        row_ids: Example and sample of each pair; empty where nobody will ask.
    """

    pairs: PromptBatch
    reference_real: Tensor
    reference_generated: Tensor | None
    row_ids: tuple[tuple[int, int], ...] = ()

    def to(self, device: torch.device | str) -> PairBatch:
        """Return a copy on `device`."""
        reference = self.reference_generated
        return replace(
            self,
            pairs=self.pairs.to(device),
            reference_real=self.reference_real.to(device),
            reference_generated=None if reference is None else reference.to(device),
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.reference_real)


@dataclass(frozen=True)
class PairLogps:
    """Summed response log-probs of a batch of pairs, nats, each of shape [n].

    Attributes:
        policy_real: log p_theta(y|x), with gradient.
        policy_generated: log p_theta(y'|x), with gradient.
        reference_real: log R(y|x).
        reference_generated: log R(y'|x).
        real_lengths: Number of response tokens of y.
        generated_lengths: Number of response tokens of y'.
    """

    policy_real: Tensor
    policy_generated: Tensor | None
    reference_real: Tensor
    reference_generated: Tensor | None
    real_lengths: Tensor
    generated_lengths: Tensor | None

    @property
    def real_log_ratio(self) -> Tensor:
        """log p_theta(y|x) - R(y|x), shape [n]."""
        return self.policy_real - self.reference_real

    @property
    def generated_log_ratio(self) -> Tensor:
        """log p_theta(y'|x) - R(y'|x), shape [n].

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
