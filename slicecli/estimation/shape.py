"""Which pair of widths loses least at as many parameters: a prediction from the dense model alone.

The rise of ln perplexity goes with what both cuts take from the stream, added up:

    L(k, m) = e(m) + 5 e(m)² + 6 δ(k) + 4 δ(k)²

with e(m) the sum over blocks of the least squared error of their MLPs on m channels, as a share of the squared stream
behind each, and δ(k) the share of the normalised stream's energy outside of the first k directions. Errors of blocks
add up in the stream, so e is a sum, while δ is a mean over all norm inputs. The constants are fitted to measured slices
(docs/shape.md); the factor from L to nats differs from model to model and does not matter for the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ShapeLosses"]

DISCARDED_LINEAR, DISCARDED_SQUARED = 6.0, 4.0
CUT_LINEAR, CUT_SQUARED = 1.0, 5.0


@dataclass(frozen=True)
class ShapeLosses:
    """What each width of a model loses.

    Attributes:
        discarded: δ at index k, up to the dense model's hidden size.
        cut: e at index m, up to all channels.
    """

    discarded: Sequence[float]
    cut: Sequence[float]

    def predict(self, dim: int, mlp_dim: int | None) -> float:
        """Return L of a pair.

        Example:
            >>> ShapeLosses([1.0, 0.5, 0.0], [0.75, 0.5, 0.0]).predict(2, 1)
            1.75
        """
        discarded = self.discarded[dim]
        cut = 0.0 if mlp_dim is None else self.cut[mlp_dim]
        return CUT_LINEAR * cut + CUT_SQUARED * cut**2 + DISCARDED_LINEAR * discarded + DISCARDED_SQUARED * discarded**2

    def equal_dim(self, dim: int, mlp_dim: int | None) -> float | None:
        """Return the dim, not a whole number, of the slice that loses as much by its hidden size alone.

        `None` where none loses that much.

        Example:
            >>> ShapeLosses([1.0, 0.5, 0.0], [1.0, 0.0]).equal_dim(1, None)
            1.0
            >>> round(ShapeLosses([1.0, 0.5, 0.0], [1.0, 0.0]).equal_dim(2, 0), 2)
            0.67
        """
        goal = self.predict(dim, mlp_dim)
        losses = [self.predict(width, None) for width in range(dim + 1)]
        below = next((width for width in reversed(range(dim + 1)) if losses[width] >= goal), None)
        if below is None or below == dim:
            return None if below is None else float(dim)
        return below + (losses[below] - goal) / (losses[below] - losses[below + 1])
