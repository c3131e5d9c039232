"""Log-probs of continuations of long contexts that begin alike, each beginning computed once.

A benchmark asks for several continuations of one context and gives many contexts the same
examples. In the order of their tokens, contexts with the longest common beginning are neighbors,
so one cache follows them: it drops what the next context does not share, and reads what is new.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from spin_lightning.out_of_memory import TokenLimit, in_parts

Tokens = tuple[int, ...]


class Continuation(NamedTuple):
    """What is scored.

    Attributes:
        context: At least one token.
        tokens: At least one token.
    """

    context: Tokens
    tokens: Tokens

    @property
    def read(self) -> Tokens:
        """The tokens that follow the context's cache: its last one, and all but the own last."""
        return (self.context[-1], *self.tokens[:-1])


class Score(NamedTuple):
    """The score of a continuation.

    Attributes:
        logp: log p(tokens | context), nats.
        is_greedy: Whether each token is the likeliest one.
    """

    logp: float
    is_greedy: bool


class _Context(NamedTuple):
    """A context and its continuations.

    Attributes:
        cached: The context without its last token.
        shared: How many tokens of `cached` the context before it begins with, too.
        places: The places in the requests of each distinct sequence that is read after `cached`.
    """

    cached: Tokens
    shared: int
    places: dict[Tokens, list[int]]


@dataclass(frozen=True)
class SharedContexts:
    """Continuations by context.

    Attributes:
        requests: The continuations.
    """

    requests: Sequence[Continuation]

    def pays(self, rows: int, pass_cost: int) -> bool:
        """Whether reading each context once is faster than a row for each continuation.

        Args:
            rows: Rows of a forward pass.
            pass_cost: What a forward pass costs besides its tokens, in tokens.
        """
        plain = shared = sequences = 0
        for context in self._contexts:
            own = sum(map(len, context.places))
            sequences += len(context.places)
            plain += len(context.cached) * len(context.places) + own
            # One pass for the context, and one for what follows it.
            shared += len(context.cached) - context.shared + own + 2 * pass_cost
        return shared < plain + math.ceil(sequences / rows) * pass_cost

    @torch.inference_mode()
    def scores(
        self, model: Any, rows: int, scored: Callable[[int], object], limit: TokenLimit
    ) -> list[Score]:
        """The score of each continuation, as without a cache.

        Passes that memory does not suffice for are halved.

        Args:
            model: A causal language model whose layers keep nothing but keys and values, and which
                the requests fit.
            rows: Most continuations in a forward pass.
            scored: Called with the number of requests scored since the last call.
            limit: Tokens of a pass, as far as memory suffices; a context counts once per row.

        Returns:
            One score per request, in their order.

        Raises:
            SpinError: Memory does not suffice for a single continuation.
        """
        found: dict[int, Score] = {}
        # Without a config, layers with a window, too, keep everything: it can be dropped again.
        cache = DynamicCache()
        for context in self._contexts:
            cache.crop(context.shared - cache.get_seq_length())
            new = torch.tensor([context.cached[context.shared :]], device=model.device)
            if new.numel():
                model.base_model(input_ids=new, past_key_values=cache, use_cache=True)
            read = sorted(context.places, key=len)

            def scores_of(sequences: list[Tokens], context: _Context = context) -> dict[int, Score]:
                return {
                    place: _score(logps, self.requests[place].tokens)
                    for sequence, logps in _next_logps(model, cache, sequences)
                    for place in context.places[sequence]
                }

            def tokens_of(sequences: list[Tokens], context: _Context = context) -> int:
                return len(sequences) * (len(context.cached) + len(sequences[-1]))

            for done in in_parts(
                [read[start : start + rows] for start in range(0, len(read), rows)],
                scores_of,
                tokens_of,
                _halves,
                limit,
                fix="evaluate tasks with shorter contexts, or on a device with more memory",
            ):
                found.update(done)
            scored(sum(map(len, context.places.values())))
        return [found[place] for place in range(len(self.requests))]

    @cached_property
    def _contexts(self) -> list[_Context]:
        """The distinct contexts in the order of their tokens."""

        def cached_of(place: int) -> Tokens:
            return self.requests[place].context[:-1]

        contexts: list[_Context] = []
        before: Tokens = ()
        for cached, places in groupby(sorted(range(len(self.requests)), key=cached_of), cached_of):
            same = takewhile(lambda pair: pair[0] == pair[1], zip(before, cached, strict=False))
            by_sequence: dict[Tokens, list[int]] = {}
            for place in places:
                by_sequence.setdefault(self.requests[place].read, []).append(place)
            contexts.append(_Context(cached, sum(1 for _ in same), by_sequence))
            before = cached
        return contexts


def _halves(sequences: list[Tokens]) -> list[list[Tokens]]:
    middle = len(sequences) // 2
    return [sequences[:middle], sequences[middle:]] if middle else []


def _next_logps(
    model: Any, cache: DynamicCache, read: Sequence[Tokens]
) -> Iterator[tuple[Tokens, Tensor]]:
    """Each sequence with the log-probs after its tokens, shape [its length, vocabulary]."""
    ids = pad_sequence([torch.tensor(tokens) for tokens in read], batch_first=True)
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(len(read))
    # Padding is at the end and later than all that is read from the result: no mask is needed.
    output = model(input_ids=ids.to(model.device), past_key_values=own, use_cache=True)
    logps = output.logits.float().log_softmax(-1)
    for tokens, row in zip(read, logps, strict=True):
        yield tokens, row[: len(tokens)]


def _score(logps: Tensor, tokens: Tokens) -> Score:
    targets = torch.tensor(tokens, device=logps.device)
    logp = logps.gather(1, targets[:, None]).sum()
    return Score(float(logp), bool((logps.argmax(-1) == targets).all()))
