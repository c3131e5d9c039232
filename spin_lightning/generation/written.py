"""The tokens that requests have got so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from spin_lightning.generation.base import Request, Response
from spin_lightning.keyed import position_uniforms


class Written:
    """The tokens of n requests, on the model's device.

    Rows are indices of requests. Row n stands for a free slot; nothing is written to it.

    Args:
        requests: The requests.
        stop_ids: A response ends with the first of these.
        device: Where the model is.
        ends: Called with the ids of an unfinished response: whether it ends there all the same.

    Attributes:
        logps: Sum of the tokens' log-probs of each row so far, float64, shape [n + 1].
    """

    def __init__(
        self,
        requests: Sequence[Request],
        stop_ids: Sequence[int],
        device: torch.device,
        ends: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        """Start with empty rows."""
        self._count, self._ends = len(requests), ends
        self._most = max(request.cap for request in requests)
        uniforms = np.stack([position_uniforms(r.key, self._most) for r in requests])
        self._uniforms = torch.from_numpy(np.pad(uniforms, ((0, 1), (0, 0)))).to(device)
        self._caps = torch.tensor([*(request.cap for request in requests), 0], device=device)
        self._stops = torch.tensor(stop_ids, device=device)
        self._ids = self._caps.new_zeros(self._count + 1, self._most)
        self.logps = torch.zeros_like(self._caps, dtype=torch.float64)
        self._lengths = torch.zeros_like(self._caps)
        self._finished = torch.zeros_like(self._caps, dtype=torch.bool)

    def uniforms(self, rows: Tensor) -> Tensor:
        """The random number of the next token of each row, in [0, 1), float64."""
        return self._uniforms[rows, self._lengths[rows].clamp_max(self._most - 1)]

    def goes_on(self, rows: Tensor) -> Tensor:
        """Which rows are not complete, bool."""
        return ~self._finished[rows] & (self._lengths[rows] < self._caps[rows])

    def add(self, rows: Tensor, tokens: Tensor, logps: Tensor) -> None:
        """Append a token to each of some rows; those that are complete stay as they are."""
        writing = self.goes_on(rows)
        rows = torch.where(writing, rows, self._count)
        self._ids[rows, self._lengths[rows]] = tokens
        self.logps[rows] += logps
        self._lengths[rows] += writing
        ended = (tokens[:, None] == self._stops).any(dim=-1)
        if self._ends is not None:
            ended = ended | self._ended_by_text(rows, writing & ~ended)
        self._finished[rows] = writing & ended

    @property
    def state(self) -> list[Tensor]:
        """The tensors that `add` changes."""
        return [self._ids, self.logps, self._lengths, self._finished]

    def responses(self) -> list[Response]:
        """The responses, in the order of the requests."""
        columns = (self._ids, self._lengths, self._finished, self.logps)
        rows = zip(*(column[: self._count].tolist() for column in columns), strict=True)
        return [Response(tuple(ids[:length]), done, logp) for ids, length, done, logp in rows]

    def _ended_by_text(self, rows: Tensor, asked: Tensor) -> Tensor:
        assert self._ends is not None
        found = []
        for row, is_asked in zip(rows.tolist(), asked.tolist(), strict=True):
            ids = self._ids[row, : int(self._lengths[row])].tolist() if is_asked else []
            found.append(is_asked and self._ends(ids))
        return torch.tensor(found, device=asked.device)
