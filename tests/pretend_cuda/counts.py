"""What a pretend device was asked to do."""

from collections import Counter
from dataclasses import dataclass, field

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})


@dataclass
class Counts:
    """Launches and host synchronizations since the last `reset`.

    Attributes:
        kernels: Launches by operation; views and allocations launch nothing.
        syncs: Points where the host waits for the device, by what it waits for.
        float32_products: Matrix products of float32 operands, by operation.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    float32_products: Counter[str] = field(default_factory=Counter)

    def reset(self) -> None:
        """Start over."""
        for counter in (self.kernels, self.syncs, self.float32_products):
            counter.clear()

    @property
    def casts(self) -> int:
        """Copies into another type, layout or storage."""
        return self.kernels["aten::_to_copy"]

    def copy(self) -> "Counts":
        """The counts so far."""
        return Counts(Counter(self.kernels), Counter(self.syncs), Counter(self.float32_products))
