"""Why a mutant may survive: it computes the same, or what differs is no behavior."""

_LAST_OF_TWO = "the tensor has two dimensions, of which the last is dimension 1"
_STATIC = "torch calls it on the class, where a function is the same as a static method"
_ALPHA = "a negative alpha was refused before"

# Module, the line as it is, the line as it was changed: why no test can or should tell them apart.
REASONS: dict[tuple[str, str, str], str] = {
    (
        "mixtures",
        "return Mixture.normalized(dict.fromkeys(members, 1.0))",
        "return Mixture.normalized(dict.fromkeys(members, 2.0))",
    ): "equal weights of any size are normalized to the same",
    (
        "mixtures",
        "grown = {i: more for i, more in growth.items() if more > _SAME_WEIGHT}",
        "grown = {i: more for i, more in growth.items() if more >= _SAME_WEIGHT}",
    ): "differs at a growth of 1e-12 to the last bit alone, which is rounding either way",
    (
        "mixtures",
        "kept = {i: self.weights[i] for i in sorted(self.weights) if self.weights[i] > 0}",
        "kept = {i: self.weights[i] for i in sorted(self.weights) if self.weights[i] != 0}",
    ): "negative weights were refused before",
    (
        "mixtures",
        "growth = {i: now.weights.get(i, 0.0) - before.weights.get(i, 0.0) for i in indices}",
        "growth = {i: now.weights.get(i, -1.0) - before.weights.get(i, 0.0) for i in indices}",
    ): "of an iterate that is gone the sign alone is used, and it is negative either way",
    (
        "mixtures",
        "if last == first:",
        "if last is first:",
    ): "members differ, so the two are equal only as the one member, the same object",
    (
        "mixtures",
        "if abs(total - 1.0) > 1e-9:",
        "if abs(total - 1.0) >= 1e-9:",
    ): "differs at a sum that is off by 1e-9 to the last bit alone",
    (
        "mixtures",
        "def rows_per_sample(opponent: Mixture | None, *, union: bool) -> int:",
        "def rows_per_sample(opponent: Mixture | None, /, union: bool) -> int:",
    ): "another signature, the same result for every call that both take",
    (
        "packing",
        "order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))",
        "order = sorted(range(len(lengths)), key=lambda i: (~lengths[i], i))",
    ): "~n is -n - 1: the same order",
    (
        "logps",
        "positions = (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)",
        "positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)",
    ): _LAST_OF_TWO,
    (
        "logps",
        "positions = (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)",
        "positions = (attention_mask.cumsum(dim=+1) - 1).clamp_min(0)",
    ): _LAST_OF_TWO,
    (
        "logps",
        "return torch.where(mask, token_logps.double(), 0.0).sum(dim=-1)",
        "return torch.where(mask, token_logps.double(), 0.0).sum(dim=+1)",
    ): _LAST_OF_TWO,
    (
        "logps",
        "",  # where the decorator below was
        "def forward(",
    ): _STATIC,
    ("logps", "", "@once_differentiable"): _STATIC,
    (
        "logps",
        "return torch.where(mask, token_logps.double(), 0.0).sum(dim=-1)",
        "return torch.where(mask, token_logps.double(), 0.0).sum(dim=1)",
    ): _LAST_OF_TWO,
    (
        "logps",
        "logp = z.gather(-1, y) - highest",
        "logp = z.gather(+1, y) - highest",
    ): _LAST_OF_TWO,
    (
        "mixtures",
        "if last == first:",
        "if last <= first:",
    ): "members ascend: the last is never less than the first",
    (
        "mixtures",
        "return tuple(sorted({*mixed, 0} if self.alpha > 0 else mixed))",
        "return tuple(sorted({*mixed, 0} if self.alpha != 0 else mixed))",
    ): _ALPHA,
    (
        "mixtures",
        (
            "return mixed if self.alpha == 0 else (1 - self.alpha) * mixed + self.alpha * "
            "member_logps[0]"
        ),
        (
            "return mixed if self.alpha <= 0 else (1 - self.alpha) * mixed + self.alpha * "
            "member_logps[0]"
        ),
    ): _ALPHA,
    (
        "mixtures",
        "return self.alpha in (0, 1) or self.mixture.members == (0,)",
        "return self.alpha in (0, 1) or self.mixture.members <= (0,)",
    ): "there are members, and no iterate comes before 0",
}
