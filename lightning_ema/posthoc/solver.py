"""Which combination of known weight profiles comes nearest to one that is wanted.

The profile of every snapshot is known exactly, and so is that of the average wanted. With the profiles of the
snapshots as columns of ``A``, each of length U + 1, and the profile wanted as ``b``, the coefficients ``c`` solve

    min |A c - b|    subject to    sum(c) = 1

and ``|A c - b| / |b|`` is the residual. ``A`` may have millions of rows. It is never stored: each chunk of time is
replaced by the few rows of its QR decomposition, which keep all distances between combinations. Normal equations would
square the condition number, which reaches 1e7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ema.schedules.base import Schedule
from lightning_ema.schedules.profiles import Timeline, weights_of


def profiles_and_target(
    tracked: Sequence[Timeline], ends: Sequence[int], wanted: Schedule, end: int
) -> tuple[Tensor, Tensor]:
    """``A`` and ``b`` in a basis in which they have few rows.

    Within a chunk that no snapshot divides, the columns of one tracked average differ by a factor alone. So a chunk of
    any length has the rank of the number of tracked averages, one more with the profile wanted, and that many rows of
    ``R`` stand for it exactly.

    Args:
        tracked: the averages that snapshots were taken of, updated at the same steps.
        ends: after how many updates each snapshot was taken.
        wanted: the schedule of the average wanted.
        end: after how many updates it is wanted.

    Returns:
        ``A`` of shape [rows, snapshots * averages], a snapshot's averages side by side, and ``b`` of shape [rows].
    """
    left = torch.zeros(len(ends), len(tracked), dtype=torch.float64)  # in each snapshot, of the chunk's last state
    left_wanted = torch.zeros((), dtype=torch.float64)
    matrix, target = [], []
    for begin, stop in tracked[0].chunks([*ends, end]):
        left[[k for k, own_end in enumerate(ends) if own_end == stop]] = 1.0
        if stop == end:
            left_wanted.fill_(1.0)
        parts = [weights_of(line.decays(begin, stop)) for line in tracked]
        if stop <= end:
            parts.append(weights_of(tracked[0].decays_of(wanted, begin, stop)))
        triangle = torch.linalg.qr(torch.stack([inside for inside, _ in parts], 1), mode="r").R
        matrix.append((triangle[:, None, : len(tracked)] * left).flatten(1))
        target.append(triangle[:, len(tracked) :].sum(1) * left_wanted)
        left *= torch.stack([before for _, before in parts[: len(tracked)]])
        left_wanted *= parts[-1][1]  # still 0 where the chunk lies after the end
    left[[k for k, own_end in enumerate(ends) if own_end == 0]] = 1.0  # written before the first update
    start = left.reshape(1, -1), left_wanted.reshape(1)
    return torch.cat([*matrix, start[0]]), torch.cat([*target, start[1]])


def solve(matrix: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """``c`` that minimizes ``|matrix c - target|`` under ``sum(c) = 1``, and ``|matrix c - target| / |target|``.

    The constraint is met by writing ``c`` as equal parts plus a combination of directions whose entries sum to 0.
    Directions that change the profile by less than float64 can tell are left out.

    Args:
        matrix: float64 of shape [rows, columns].
        target: float64 of shape [rows].
    """
    columns = matrix.shape[1]
    equal = matrix.new_full((columns,), 1 / columns)
    directions = torch.linalg.qr(matrix.new_ones(columns, 1), mode="complete").Q[:, 1:]
    left, sizes, right = torch.linalg.svd(matrix @ directions, full_matrices=False)
    told = sizes > 1e-13 * sizes[:1]
    shares = left.mT @ (target - matrix @ equal)
    values = equal + directions @ (right.mT[:, told] @ (shares[told] / sizes[told]))
    residual = torch.linalg.vector_norm(matrix @ values - target) / torch.linalg.vector_norm(target)
    return values, float(residual)
