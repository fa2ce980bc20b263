"""Frechet distance between Gaussians fitted to features (Heusel et al., arXiv 1706.08500, equation 6).

    FD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

All in float64. `GaussianStatistics` streams; `frechet_distance` is the metric; `frechet_distance_tensor` is the same
number with a gradient, for losses.
"""

import hashlib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import limits
from common.archives import open_npz
from common.errors import UserError
from common.files import write_bytes

FORMAT = 1  # of the npz written by GaussianStatistics.save


class GaussianStatistics:
    """Mean and covariance of a stream of feature vectors, float64.

    Kept as count, mean and centred scatter sum (x-m)(x-m)^T, and merged pairwise (Chan, Golub, LeVeque 1979), so that
    features far from zero lose no digits and the order of batches or ranks changes rounding only.

    dim     width of a feature vector
    record  what was measured: extractor, its hash, data set, rounding ... (JSON values); saved with the numbers
    device  where the sums live; needs float64
    """

    def __init__(self, *, dim: int, record: Mapping | None = None, device: str | torch.device = "cpu"):
        self.dim = limits.whole("dim", dim, least=1, hint="Give the width of the feature vectors.")
        self.record = dict(record or {})
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, features: Tensor) -> "GaussianStatistics":
        """Adds features (B, dim), B >= 0, any float type. Returns self. Raises UserError on a wrong width or NaN."""
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise UserError(f"features must have shape (B, {self.dim}), got {tuple(features.shape)}.")
        if len(features) == 0:
            return self
        x = features.to(self.mean.device, torch.float64)
        mean = x.mean(0)
        if not torch.isfinite(mean).all():
            raise UserError("features hold non-finite values, so no distance is defined. Look at the images first.")
        x = x - mean
        self._merge(len(x), mean, x.T @ x)
        return self

    @torch.no_grad()
    def merge(self, other: "GaussianStatistics") -> "GaussianStatistics":
        """Adds everything `other` has seen (another rank, another part of the data). Returns self."""
        if other.dim != self.dim:
            raise UserError(f"statistics of width {other.dim} cannot join statistics of width {self.dim}.")
        if other.n:
            self._merge(other.n, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))
        return self

    def _merge(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        # Chan, Golub, LeVeque: with d = mean_b - mean_a and n = n_a + n_b,
        # mean = mean_a + d n_b / n,  S = S_a + S_b + d d^T n_a n_b / n
        total = self.n + n
        shift = mean - self.mean
        self.mean = self.mean + shift * (n / total)
        self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.n * n / total)
        self.n = total

    def cov(self, ddof: int = 1) -> Tensor:
        """Covariance (dim, dim), divisor n - ddof: 1 is the rule of EDM, EDM2 and torch-fidelity, 0 that of ECT.

        Raises UserError when n - ddof < 1.
        """
        limits.choice("ddof", ddof, (0, 1), hint="Set 0 to divide by n, 1 to divide by n - 1.")
        if self.n - ddof < 1:
            raise UserError(f"a covariance needs at least {1 + ddof} samples, got {self.n}. Measure more images.")
        return self.scatter / (self.n - ddof)

    def require(self, minimum: int) -> None:
        """Raises UserError naming both counts when fewer than `minimum` samples were seen."""
        if self.n < minimum:
            raise UserError(f"found {self.n} images, but expected at least {minimum}. Make more, or lower the minimum.")

    def digest(self) -> str:
        """SHA-256 (hex) of the record, the count and the bytes of mean and scatter."""
        digest = hashlib.sha256(json.dumps([FORMAT, self.n, self.dim, self.record], sort_keys=True).encode())
        for array in (self.mean, self.scatter):
            digest.update(np.ascontiguousarray(array.cpu().numpy(), dtype="<f8").tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Writes an npz (n, mean, scatter, record as JSON, sha256), atomically."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            n=np.int64(self.n),
            mean=self.mean.cpu().numpy(),
            scatter=self.scatter.cpu().numpy(),
            record=np.array(json.dumps(self.record, sort_keys=True)),
            sha256=np.array(self.digest()),
        )
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "GaussianStatistics":
        """Reads what `save` wrote. Raises UserError when the file is missing, truncated or altered."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no reference statistics at {path}. Make them: python -m tools.fid_ref --out {path} ...")
        try:
            with open_npz(path) as file:
                mean, scatter = file["mean"], file["scatter"]
                record = json.loads(str(file["record"]))
                statistics = cls(dim=len(mean), record=record)
                statistics.n = int(file["n"])
                statistics.mean = torch.from_numpy(mean)
                statistics.scatter = torch.from_numpy(scatter)
                intact = str(file["sha256"]) == statistics.digest()
        except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a readable statistics file: {error}. Delete it, make it again.") from error
        if not intact:
            raise UserError(f"{path} was altered: its checksum does not match. Delete it and make it again.")
        return statistics


@torch.no_grad()
def frechet_distance(
    a: GaussianStatistics, b: GaussianStatistics, *, ddof: int = 1, minimum: int | None = None
) -> float:
    """FD of two sets of statistics; symmetric, >= 0 up to rounding, 0 on itself.

    ddof     divisor of both covariances, see `GaussianStatistics.cov`
    minimum  UserError naming both counts when either side saw fewer samples; None: only a warning below dim + 1,
             where the covariance is singular and the distance strongly biased upwards

    tr (S1 S2)^(1/2) is the sum of singular values of S1^(1/2) S2^(1/2). Unlike sqrtm of the product this takes no root
    of a rounding error, so singular covariances are fine too.
    """
    if a.dim != b.dim:
        raise UserError(f"features of width {a.dim} and {b.dim} cannot be compared. Use one extractor for both.")
    for side in (a, b):
        if minimum is not None:
            side.require(minimum)
        elif side.n < side.dim + 1:
            warnings.warn(
                f"{side.n} images give a singular covariance of {side.dim}-d features: use at least {side.dim + 1}",
                stacklevel=2,
            )
    cov_a, cov_b = a.cov(ddof), b.cov(ddof).to(a.mean.device)
    # With S = L L^T: S1 S2 has the eigenvalues of (L1^T L2)(L1^T L2)^T, whose roots are the singular values of L1^T L2.
    cross = torch.linalg.svdvals(_root_factor(cov_a).T @ _root_factor(cov_b)).sum()
    gap = (a.mean - b.mean.to(a.mean.device)).square().sum()
    return float(gap + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet_distance_tensor(mean: Tensor, cov: Tensor, reference_mean: Tensor, reference_cov: Tensor) -> Tensor:
    """The same distance as a scalar tensor, differentiable in `mean` (D,) and `cov` (D, D) but not in the reference.

    With R = reference_cov^(1/2):  d/dmean = 2 (mean - reference_mean),  d/dcov = I - R (R cov R)^(-1/2) R, and hence
    for features f (N, D) with N - 1 in the covariance
        dFD/df_i = 2 (mean - reference_mean)/N + 2/(N-1) (f_i - mean) (I - R (R cov R)^(-1/2) R).
    Directions without variance get gradient zero instead of infinity. Only eigenvalues are differentiated, so repeated
    ones are harmless. Runs in float64 whatever comes in.
    """
    mean, cov = mean.to(torch.float64), cov.to(torch.float64)
    with torch.no_grad():
        reference_mean, reference_cov = reference_mean.to(torch.float64), reference_cov.to(torch.float64)
        values, vectors = _eigh_psd(reference_cov)
        root = (vectors * values.sqrt()) @ vectors.T
    product = root @ cov @ root  # R S R has the eigenvalues l of S R^2: tr (S R^2)^(1/2) = sum of sqrt(l)
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    positive = eigenvalues > eigenvalues.detach().max() * len(eigenvalues) * torch.finfo(torch.float64).eps
    # the root of 1 stands in for that of 0: an infinite derivative times a zero mask would be nan
    cross = torch.where(positive, eigenvalues, 1.0).sqrt().where(positive, 0.0).sum()
    return (mean - reference_mean).square().sum() + cov.trace() + reference_cov.trace() - 2 * cross


def _eigh_psd(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a covariance; what is negative or lost in rounding is set to zero."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    threshold = values.max().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > threshold, values, 0.0), vectors


def _root_factor(cov: Tensor) -> Tensor:
    """L with L L^T = cov."""
    values, vectors = _eigh_psd(cov)
    return vectors * values.sqrt()
