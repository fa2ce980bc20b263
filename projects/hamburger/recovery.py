"""Does a few steps' decomposition recover a low-rank matrix under noise, and what does it cost to train through it?"""

import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.restart import RestartingDataModule
from common.data.sampler import check_batch_size
from common.data.source import check_split
from common.errors import UserError
from common.ham.decompose import Decomposition
from common.ham.ham import Ham
from common.runtime.training.module import ResearchModule


class ScalarBread(nn.Module):
    """y = upper * ham(relu(lower * x)) with two scalars, 1 at the start: the cheapest bread there is, so that the time
    of a training step is the ham's. (B, d, n) -> the same shape.

    channels       d
    decomposition  of the ham
    """

    def __init__(self, *, channels: int, decomposition: Decomposition):
        super().__init__()
        self.channels = channels
        self.lower = nn.Parameter(torch.ones(()))
        self.ham = Ham(channels, decomposition)
        self.upper = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.upper * self.ham(F.relu(self.lower * x))


class Recovery(ResearchModule):
    """Denoises matrices of low rank; its evaluation compares what every method does, each applied to the noisy matrix.

    Training fits the two scalars of `net` to the clean matrices; the errors do not depend on them. With
    `evaluate.timed_steps` the run also measures what a training step through the ham costs.

    net      `ScalarBread`
    methods  name -> decomposition; metrics `<name>_error`. Null takes an inherited entry away
    rank     of `svd_error`: the best approximation of that rank to the noisy matrix
    columns  n of the matrices that planning counts with
    optimizer, schedule   see `ResearchModule`

    Errors are relative to the clean matrix: |Y - X| / |X| (Frobenius), a mean over matrices; `input_error` is that of
    the noisy matrix itself.
    """

    unit = "matrices"

    def __init__(
        self,
        *,
        net: ScalarBread,
        methods: Mapping[str, Decomposition | None],
        rank: int,
        columns: int,
        optimizer: Callable,
        schedule: Callable | None,
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule)
        if rank < 1:
            raise UserError(f"project.rank must be >= 1, got {rank}. Set it to the rank of the clean matrices.")
        self.methods = {name: method for name, method in methods.items() if method is not None}
        self.rank, self.columns = rank, columns

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Mean squared error of the denoised matrices."""
        loss = F.mse_loss(self.net(batch["noisy"]), batch["clean"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def evaluation_step(self, batch: dict) -> dict[str, tuple[Tensor, float]]:
        clean, noisy = batch["clean"], batch["noisy"]
        found = {}
        for name, method in self.methods.items():
            # every method of every run starts from the same bases of each matrix
            bases = [
                method.draw(1, noisy.shape[1], generator=torch.Generator().manual_seed(position))
                for position in batch["position"].tolist()
            ]
            dictionary, codes = method.solve(noisy, torch.cat(bases).to(noisy), steps=method.eval_steps)
            found[name] = dictionary @ codes
        found |= {"input": noisy, "svd": truncated(noisy, self.rank)}
        return {f"{name}_error": (relative_error(y, clean).sum(), float(len(clean))) for name, y in found.items()}

    def fake_batch(self, samples: int) -> dict[str, Tensor]:
        """`clean`, `noisy` (N, d, n), `position` (N,)."""
        shape = samples, self.net.channels, self.columns
        return {
            "clean": torch.empty(shape),
            "noisy": torch.empty(shape),
            "position": torch.zeros(samples, dtype=torch.int64),
        }


def relative_error(y: Tensor, clean: Tensor) -> Tensor:
    """|y - clean| / |clean| (B,) of matrices (B, d, n)."""
    return torch.linalg.matrix_norm(y - clean) / torch.linalg.matrix_norm(clean)


def truncated(x: Tensor, rank: int) -> Tensor:
    """The nearest matrices of that rank to x (B, d, n) (Eckart and Young)."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u[:, :, :rank] * s[:, None, :rank]) @ v[:, :rank]


# ---------------------------------------------------------------------------------------------------------------------
# Matrices


class LowRankMatrices(RestartingDataModule):
    """Batches `clean` and `noisy` float32 (B, d, n), `position` int64 (B,); splits train (without end) and test.

    clean = D C with D (d, rank) and C (rank, n) of squared uniform numbers; noisy = max(clean + noise m e, 0), e normal
    and m the mean of the clean matrix. Matrix i of a split depends on (seed, split, i) alone.

    rows, columns    d, n >= 1
    rank             of the clean matrices, 1..min(d, n)
    noise            deviation of the noise, in means of the clean matrix, >= 0
    batch_size       matrices per optimiser step over all processes and accumulated micro-batches, >= 1
    eval_batch_size  matrices per evaluation batch, >= 1
    test_count       matrices of the test split, >= 1
    seed             of everything

    Raises UserError for numbers out of range.
    """

    sampled = "matrices"
    splits = ("train", "test")
    num_classes = 0
    name = "low_rank"
    shuffle = False

    def __init__(
        self,
        *,
        rows: int = 64,
        columns: int = 256,
        rank: int = 8,
        noise: float = 0.5,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        test_count: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        check_batch_size(batch_size, 1, "1")
        check_batch_size(eval_batch_size, 1, "1", field="data.eval_batch_size")
        if not 1 <= rank <= min(rows, columns):
            raise UserError(f"data.rank must be between 1 and the smaller side of {rows} x {columns}, got {rank}.")
        if noise < 0:
            raise UserError(f"data.noise must be >= 0, got {noise}. Set 0 for none.")
        if test_count < 1:
            raise UserError(f"data.test_count must be >= 1, got {test_count}. Set it to the matrices to measure.")
        self.rows, self.columns, self.rank, self.noise = rows, columns, rank, noise
        self.batch_size, self.eval_batch_size, self.test_count = batch_size, eval_batch_size, test_count
        self.seed = seed

    def check(self) -> None:
        """Nothing can be missing: the matrices are generated."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._check_shares()

    def fingerprint(self, split: str) -> str:
        """16 hex digits of the recipe."""
        check_split(split, self.splits, self.name)
        facts = (split, self.rows, self.columns, self.rank, self.noise, self.test_count, self.seed)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def matrices(self, split: str, positions: list[int]) -> dict[str, Tensor]:
        """One batch."""
        drawn = [self._pair(split, position) for position in positions]
        clean, noisy = map(torch.stack, zip(*drawn))
        return {"clean": clean, "noisy": noisy, "position": torch.tensor(positions, dtype=torch.int64)}

    def _pair(self, split: str, position: int) -> tuple[Tensor, Tensor]:
        key = hashlib.sha256(f"low rank {self.seed} {split} {position}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        uniform = lambda *shape: torch.rand(*shape, generator=generator)
        clean = uniform(self.rows, self.rank).square() @ uniform(self.rank, self.columns).square()
        noise = torch.randn(self.rows, self.columns, generator=generator)
        return clean, (clean + self.noise * clean.mean() * noise).relu()

    def train_dataloader(self) -> "MatrixBatches":
        """Endless batches of this process, from `samples_seen()` on, at every start of an iteration."""
        self._check_shares()
        return MatrixBatches(self, self._start(), *self._world())

    def val_dataloader(self) -> list:
        """None: `eval_batches` judges."""
        return []

    def eval_batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """The first `test_count` matrices of the split, each once over all processes."""
        check_split(split, self.splits, self.name)
        rank, world_size = self._world()
        for batch in torch.arange(self.test_count)[rank::world_size].split(self.eval_batch_size):
            yield self.matrices(split, batch.tolist())


class MatrixBatches:
    """Endless training batches of one process: its contiguous share of every `micro_batch_size` positions."""

    def __init__(self, data: LowRankMatrices, start: int | Callable[[], int], rank: int, world_size: int):
        self.data, self.start, self.rank, self.world_size = data, start, rank, world_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        position = self.start() if callable(self.start) else self.start
        share = self.data.micro_batch_size // self.world_size
        while True:
            first = position + self.rank * share
            yield self.data.matrices("train", list(range(first, first + share)))
            position += self.data.micro_batch_size
