"""Scores that need single features or class predictions rather than two moments."""

import torch
from torch import Tensor

from common import limits
from common.errors import UserError


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of exp(E_x KL(p(y|x) || p(y))), Salimans et al. (arXiv 1606.03498).

    logits  (N, K) unnormalised, in the order the images were made: contiguous splits, no shuffling. K = 1008 for the
            2015 Inception network. 1 = all predictions equal, K = confident and evenly spread.

    Raises UserError when N < splits.
    """
    limits.positive(splits=splits)
    if logits.dim() != 2 or len(logits) < splits:
        raise UserError(
            f"an inception score in {splits} splits needs logits (N, K) of at least that many images, got shape "
            f"{tuple(logits.shape)}. Set samples higher."
        )
    logits = logits.to(torch.float64)
    scores = []
    for k in range(splits):
        part = logits[k * len(logits) // splits : (k + 1) * len(logits) // splits]
        log_p = part.log_softmax(1)
        # log p(y) = log((1/N) sum_x p(y|x));  KL = sum_y p(y|x) (log p(y|x) - log p(y)), where 0 log 0 counts 0
        log_marginal = log_p.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log().to(log_p.device)
        scores.append((log_p.exp() * (log_p - log_marginal)).nan_to_num(nan=0.0).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def precision_recall(real: Tensor, fake: Tensor, *, neighbours: int = 3, chunk: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    real (N, D), fake (M, D)  features, on one device
    neighbours  k: a sample's ball reaches to its k-th nearest neighbour of its own set, itself not counted
    chunk       rows compared at once: memory is chunk x max(N, M), never N x M

    precision = share of fakes inside some real ball, recall = share of reals inside some fake ball.
    Raises UserError when a set has no more than `neighbours` members.
    """
    limits.positive(neighbours=neighbours, chunk=chunk)
    if min(len(real), len(fake)) <= neighbours:
        raise UserError(
            f"precision and recall with {neighbours} neighbours need more than {neighbours} images on both sides, "
            f"got {len(real)} real and {len(fake)} generated ones. Set samples higher."
        )
    # Float64 and a common centre: squared distances come from a matrix product, which cancels large norms.
    real, fake = real.to(torch.float64), fake.to(torch.float64)
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    # rounding of |a|^2 + |b|^2 - 2 a.b: a point at the very radius of a ball counts as inside
    slack = 1e-12 * float(real.square().sum(1).mean() + fake.square().sum(1).mean())
    return (
        _covered(fake, real, _radii(real, neighbours, chunk) + slack, chunk),
        _covered(real, fake, _radii(fake, neighbours, chunk) + slack, chunk),
    )


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, cut at 0 where rounding makes it negative
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def _radii(x: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row."""
    # k + 1: the nearest row is the row itself
    return torch.cat([_squared_distances(part, x).kthvalue(neighbours + 1, dim=1).values for part in x.split(chunk)])


def _covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    """Share of points inside at least one ball."""
    inside = [(_squared_distances(part, centres) <= radii).any(1) for part in points.split(chunk)]
    return float(torch.cat(inside).to(torch.float64).mean())


def kernel_distance(real: Tensor, fake: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Unbiased squared MMD with the kernel (x.y/D + 1)^3, averaged over random subsets: KID (arXiv 1801.01401).

    real (N, D), fake (M, D)  features; size is cut to min(N, M). Can be negative. Raises UserError below 2 images.
    """
    size = min(size, len(real), len(fake))
    limits.positive(subsets=subsets)
    if size < 2:
        raise UserError(f"a kernel distance needs >= 2 images on both sides, got {len(real)} and {len(fake)}.")
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=generator)[:size].to(real.device)].to(torch.float64)
        y = fake[torch.randperm(len(fake), generator=generator)[:size].to(fake.device)].to(torch.float64)
        xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        # MMD^2 = sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (n (n - 1)) - (2 / n^2) sum_{i,j} k(x_i, y_j)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        total += float(within - 2 * xy.mean())
    return total / subsets


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
