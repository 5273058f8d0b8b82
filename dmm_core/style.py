"""The codebook: style weights in, style vector out. torch alone.

    s = MLP(Σ w_i e_i)        DMM (arXiv:2504.12364) §3.3, A.1

Mixing happens between the codebook's rows, BEFORE the MLP; a mix of style vectors is something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dmm_core.errors import StyleError

Mix = Mapping[str, float]  # style name → weight


class StyleMLP(nn.Module):
    """Linear(d, d) → SiLU → Linear(d, d): codebook row(s) (..., d) → style vector(s) (..., d).

    The last layer starts at zero, so that an untrained codebook changes nothing.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(embedding)))


class Codebook(nn.Module):
    """N named styles of width d, and the MLP that makes a style vector of a mix of them.

    Parameter names are those of the published files: ``model_embedding.weight`` (N, d) and
    ``add_embedding.linear_{1,2}.{weight,bias}``.

    Raises:
        StyleError: no names, an empty or repeated name, or a default that no mix can be made of.
    """

    def __init__(self, names: Sequence[str], dim: int, default: Mix | None = None) -> None:
        super().__init__()
        self.names = tuple(names)
        if not self.names or not all(self.names) or len(set(self.names)) < len(self.names):
            raise StyleError(f"style names must be given, none empty and none twice, got {list(self.names)}")
        self.dim = dim
        self.model_embedding = nn.Embedding(len(self.names), dim)
        self.add_embedding = StyleMLP(dim)
        self.default = dict(default) if default else dict.fromkeys(self.names, 1 / len(self.names))
        self.weights(self.default)

    def __len__(self) -> int:
        return len(self.names)

    def weights(self, mix: Mix, normalize: bool = True) -> Tensor:
        """Style weights (N,) in codebook order; ``normalize`` divides by their sum (the paper's Σ w = 1).

        Raises:
            StyleError: an unknown style, a weight that is not finite, or a sum of 0 that was to become 1.
        """
        for name in mix:
            if name not in self.names:
                raise StyleError(f"there is no style {name!r} here", hint=f"The styles are: {', '.join(self.names)}.")
        values = [float(mix.get(name, 0.0)) for name in self.names]
        if not all(map(math.isfinite, values)):
            raise StyleError(f"style weights must be finite numbers, got {dict(mix)}")
        total = math.fsum(values)
        if normalize and abs(total) < 1e-6:
            raise StyleError("the style weights sum to 0", hint="Raise at least one, or turn normalise off.")
        w = torch.tensor(values, dtype=torch.float64)
        return (w / total if normalize else w).to(self.model_embedding.weight)

    def forward(self, weights: Tensor) -> Tensor:
        """Style vectors (..., d) of style weights (..., N)."""
        return self.add_embedding(weights @ self.model_embedding.weight)

    def style(self, mix: Mix, normalize: bool = True) -> Tensor:
        """Style vector (d,) of a mix, e.g. ``{"ink": 0.7, "neon": 0.3}``."""
        return self(self.weights(mix, normalize))

    def default_style(self) -> Tensor:
        """Style vector (d,) of the default mix; zero once it is folded into the UNet."""
        return self.style(self.default)

    @torch.no_grad()
    def take_over(self, earlier: Codebook) -> None:
        """Get the MLP of an earlier codebook, and its rows for the first styles. DMM (arXiv:2504.12364) §3.5.

        The styles that are new keep their random rows.

        Raises:
            StyleError: these styles do not begin with the earlier ones.
        """
        count = len(earlier)
        if self.names[:count] != earlier.names:
            raise StyleError(f"the styles {list(self.names)} do not begin with {list(earlier.names)}")
        self.model_embedding.weight[:count] = earlier.model_embedding.weight
        self.add_embedding.load_state_dict(earlier.add_embedding.state_dict())

    @torch.no_grad()
    def stretch(self, factor: float) -> None:
        """Move all style vectors away from the mean of the styles': each is ``factor`` times as far from it."""
        centre = self(torch.eye(len(self)).to(self.model_embedding.weight)).mean(0)
        last = self.add_embedding.linear_2
        last.weight *= factor
        last.bias.copy_(centre + factor * (last.bias - centre))

    @torch.no_grad()
    def fold(self) -> Tensor:
        """Make the default style this codebook's zero; returns what the UNet's ``time_embed.2.bias`` must gain, (d,).

        The sum of both, hence every style's output, stays the same; a reader that knows nothing of DMM gets the
        default style. Folding again returns (near) zero.
        """
        s0 = self.default_style().clone()
        self.add_embedding.linear_2.bias -= s0
        return s0


def one_hot(names: Sequence[str], name: str) -> dict[str, float]:
    """The mix that is one style."""
    return {other: float(other == name) for other in names}


def lerp(a: Mix, b: Mix, amount: float) -> dict[str, float]:
    """The mix ``amount`` of the way from a (0) to b (1); beyond either is extrapolation."""
    return {name: (1 - amount) * a.get(name, 0.0) + amount * b.get(name, 0.0) for name in {**a, **b}}
