"""What a pretend device was asked to do."""

from collections import Counter
from dataclasses import dataclass, field

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})


class Launches(Counter[str]):
    """Launches by operation.

    Attributes:
        order: The operations in the order of their launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def __setitem__(self, name: str, count: int) -> None:
        self.order += [name] * (count - self[name])
        super().__setitem__(name, count)

    def clear(self) -> None:
        super().clear()
        self.order.clear()

    def copy(self) -> "Launches":
        """The launches so far."""
        copied = Launches()
        copied.update(self)
        copied.order = list(self.order)
        return copied


@dataclass
class Counts:
    """Launches and host synchronizations since the last `reset`.

    Attributes:
        kernels: Launches by operation; views and allocations launch nothing.
        syncs: Points where the host waits for the device, by what it waits for.
        float32_products: Matrix products of float32 operands, by operation.
    """

    kernels: Launches = field(default_factory=Launches)
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
        return Counts(self.kernels.copy(), Counter(self.syncs), Counter(self.float32_products))
