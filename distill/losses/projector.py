"""What brings the student's activations to the teacher's width: trained with the student, no part of it."""

from typing import Literal

from torch import Tensor, float64, nn
from torch.nn import functional as F

from distill.types import ConfigError

Kind = Literal["auto", "none", "linear", "mlp"]


def projector(kind: Kind, d_student: int, d_teacher: int, key: str) -> nn.Module:
    """Make a map from `[..., d_student]` to `[..., d_teacher]`.

    - `auto`: none where the widths agree, else linear.
    - `none`: the identity.
    - `linear`: `W x`, without a bias (TinyBERT, Jiao et al. 2019, arXiv 1909.10351, equation 8; the authors' program has a bias).
    - `mlp`: `W_2 GELU(W_1 x + b_1) + b_2`, d_teacher wide inside.

    Args:
        kind: see above.
        d_student: width of the student's activations.
        d_teacher: width of the teacher's.
        key: of `kind` in the configuration, for messages.

    Raises:
        ConfigError: `none` for different widths.
    """
    if kind == "none" and d_student != d_teacher:
        raise ConfigError(f"{key}: the student is {d_student} wide and the teacher {d_teacher}, so none cannot work; take linear or mlp")
    if kind == "none" or (kind == "auto" and d_student == d_teacher):
        return nn.Identity()
    if kind == "mlp":
        return nn.Sequential(FullLinear(d_student, d_teacher), nn.GELU(), FullLinear(d_teacher, d_teacher))
    return FullLinear(d_student, d_teacher, bias=False)


class FullLinear(nn.Linear):
    """A linear layer that computes in the precision of its input, also where the trainer keeps its weights in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., d_in]` to `[..., d_out]`."""
        return F.linear(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))


def full(x: Tensor) -> Tensor:
    """Give a tensor in float32 (float64 stays)."""
    return x if x.dtype == float64 else x.float()


def describe(module: nn.Module) -> str:
    """Say what a projector is, e.g. `linear 64→128`."""
    if isinstance(module, nn.Linear):
        return f"linear {module.in_features}→{module.out_features}"
    if isinstance(module, nn.Sequential):
        return f"mlp {module[0].in_features}→{module[2].out_features}"
    return "no projector"
