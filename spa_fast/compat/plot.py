"""A front shaped like PLOT's loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spa_fast import _checks as checks
from spa_fast import transport


def plot_sinkhorn(
    sim: Tensor,
    eps: float = 0.1,
    max_iter: int = 100,
    thresh: float = 1e-2,
    *,
    return_plan: bool = False,
    backend: str = "auto",
) -> Any:
    """sum T * sim, T the transport plan of cost 1 - sim between uniform weights: PLOT's loop in one call.

        K = exp((sim - 1) / eps);  r = u / (K c), c = v / (K^T r) from c = 1, <= max_iter times;  T = r K c

    Args:
        sim: [..., K, M] similarities, patches by prompts.
        thresh: each problem stops by itself once sum_i |sum_j T_ij - u_i| <= thresh, a relative change of
            the scalings: sum_i u_i |r_i / r_i_next - 1|. PLOT stops all problems together, once their mean
            |r - r_next| <= 1e-2; r grows with exp(1 / eps), so that its number of iterations does too. thresh
            = 0 runs max_iter iterations and gives PLOT's iterate to rounding.

    Returns:
        [...] in the accumulate dtype, T held constant in the gradient (PLOT computes it under no_grad), or
        `SinkhornOutput`. Where PLOT's exp(-cost / eps) underflows and it returns None, this stays finite;
        NaN in `sim` makes its own problem NaN.

    Source:
        Chen et al., "PLOT: Prompt Learning with Optimal Transport for Vision-Language Models", ICLR 2023.
    """
    checks.check_tol(thresh, "thresh")
    return transport.align_similarity(
        sim, eps=eps, max_iter=max_iter, tol=thresh, return_plan=return_plan, backend=backend
    )
