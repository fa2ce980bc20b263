"""The data module of language models: a text cut into parallel streams, read segment by segment, exact restart.

Which tokens a run sees depends on the rows drawn so far and on nothing else: not on the number of processes, not on
evaluation in between, not on whether the run was interrupted.
"""

from collections.abc import Iterator

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from common import limits
from common.data.restart import RestartingDataModule
from common.data.sampler import check_batch_size
from common.data.source import check_split, sha256
from common.data.text.corpus import Corpus, Vocabulary
from common.errors import UserError

IGNORED = -1  # target of a position behind a stream's end, evaluation only


class Streams:
    """Tokens (N,) as `rows` contiguous streams of equal length, walked in segments of `length` positions.

    A stream's position is a token and the one after it, its target: N - 1 positions in all. Segment s of every stream
    begins at position s * length; the last one may be shorter.

    whole  True (training): N - 1 is cut down to a multiple of rows, up to rows - 1 positions at the end are dropped;
           False (evaluation): every position once, streams filled up with positions whose target is IGNORED
    """

    def __init__(self, tokens: np.ndarray, *, rows: int, length: int, whole: bool):
        self.tokens, self.rows, self.length, self.whole = tokens, rows, length, whole
        self.positions = len(tokens) - 1
        self.per_row = self.positions // rows if whole else -(-self.positions // rows)
        self.segments = -(-self.per_row // length)

    def segment(self, number: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens and targets int64 (len(rows), T), T <= length, of that segment of those streams."""
        first = number * self.length
        steps = np.arange(first, min(first + self.length, self.per_row))
        places = rows[:, None] * self.per_row + steps
        inside = places < self.positions
        places = np.minimum(places, self.positions - 1)
        tokens = self.tokens[places].astype(np.int64)
        targets = np.where(inside, self.tokens[places + 1].astype(np.int64), IGNORED)
        return torch.from_numpy(tokens), torch.from_numpy(targets)


class TextDataModule(RestartingDataModule):
    """Batches `tokens`, `targets` int64 (B, T): the same streams one segment further each time, so that a model may
    carry memory from batch to batch; `first` bool: the streams begin anew, what came before does not belong to them.

    Evaluation batches also hold `bytes` int64 (B, T), the bytes of text each target stands for (0 where the target is
    -1, behind the end of the text).

    source           text: `PlainText`, `WordFiles` (see `common.data.text.corpus.Corpus`)
    vocabulary       tokens it must turn out to have (networks are sized before files are read), None: any number
    batch_size       streams = rows per optimiser step over all processes and accumulated micro-batches, >= 1
    length           positions of a training segment, >= 1
    eval_batch_size  streams a split is read in for evaluation, over all processes, >= 1
    eval_length      positions of an evaluation segment, None: length
    name             in messages and beside numbers, None: the source's
    root             data folder the source was given; kept for messages

    Raises UserError for numbers out of range, and from `check`, `setup` and the loaders for missing or damaged files, a
    text too short for the streams, or another number of tokens than `vocabulary`.
    """

    holds = "text"
    sampled = "rows"  # a row is one segment of one stream
    seen_key = "rows_seen"

    def __init__(
        self,
        *,
        source: Corpus,
        vocabulary: int | None = None,
        batch_size: int = 32,
        length: int = 150,
        eval_batch_size: int = 16,
        eval_length: int | None = None,
        name: str | None = None,
        root: str | None = None,
    ):
        super().__init__()
        check_batch_size(batch_size, 1, "1")
        check_batch_size(eval_batch_size, 1, "1", field="data.eval_batch_size")
        for field, value in (("length", length), ("eval_length", eval_length)):
            if value is not None:
                limits.whole(f"data.{field}", value, least=1, hint=f"Set data.{field}=150, in positions.")
        self.source = source
        self.vocabulary_size = vocabulary
        self.batch_size, self.length = batch_size, length
        self.eval_batch_size, self.eval_length = eval_batch_size, eval_length or length
        self.name = name or source.name
        self.root = root
        self._tokens: dict[str, np.ndarray] = {}

    # What the data set is ---------------------------------------------------------------------------------------------

    @property
    def splits(self) -> tuple[str, ...]:
        return self.source.splits

    @property
    def vocabulary(self) -> Vocabulary:
        """Reads files. Raises UserError when its size is not the one the run was set up for."""
        vocabulary = self.source.vocabulary()
        if self.vocabulary_size not in (None, vocabulary.size):
            raise UserError(
                f"{self.name} has {vocabulary.size} different tokens, the run is set up for {self.vocabulary_size}. "
                f"Set data.vocabulary={vocabulary.size}, or check that the files are the right ones."
            )
        return vocabulary

    def check(self) -> None:
        """Cheap look whether the files are there, before any work. Raises UserError saying what to do."""
        self.source.check()

    def tokens(self, split: str) -> np.ndarray:
        """Tokens (N,) of one split, read on first use. Raises UserError for an unknown split or damaged files."""
        check_split(split, self.splits, self.name)
        if split not in self._tokens:
            size = self.vocabulary.size  # first: a wrong corpus is refused before it is encoded
            tokens = self.source.load(split)
            if len(tokens) and int(tokens.max()) >= size:
                raise UserError(f"{self.name}: the split {split} holds token {tokens.max()}, of {size}. Read it anew.")
            self._tokens[split] = tokens
        return self._tokens[split]

    def fingerprint(self, split: str) -> str:
        """16 hex digits that change when the tokens of the split do."""
        return sha256(np.asarray(self.tokens(split)))[:16]

    # Lightning --------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Builds what the source caches, on one process of each machine."""
        self.check()
        for split in self.splits:
            self.source.load(split)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._check_shares()
            self._training_streams()

    def train_dataloader(self) -> "TrainBatches":
        """Endless batches of this process, from `samples_seen()` on, at every start of an iteration."""
        self._check_shares()
        rank, world_size = self._world()
        return TrainBatches(
            self._training_streams(),
            micro=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
            start=self._start(),
        )

    def eval_batches(self, split: str) -> Iterator[dict[str, Tensor | bool]]:
        """Every position of the split once, in order; each process reads its share of the streams."""
        streams = self._cut(split, self.eval_batch_size, self.eval_length, whole=False)
        rank, world_size = self._world()
        rows = np.array_split(np.arange(streams.rows), world_size)[rank]
        lengths = torch.from_numpy(self.vocabulary.lengths())
        for number in range(streams.segments if len(rows) else 0):
            tokens, targets = streams.segment(number, rows)
            known = targets.clamp(min=0)
            yield {
                "tokens": tokens,
                "targets": targets,
                "first": number == 0,
                "bytes": lengths[known].masked_fill(targets == IGNORED, 0),
            }

    # Where the run stands ---------------------------------------------------------------------------------------------

    def _order_facts(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "length": self.length}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Another batch size or length goes on as far into the text as the run was, at the start of a segment."""
        super().load_state_dict(state_dict)
        old_rows, old_length = state_dict["batch_size"], state_dict["length"]
        if (old_rows, old_length) != (self.batch_size, self.length):
            steps = self.start_samples * old_length // (self.batch_size * self.length)
            self.start_samples = steps * self.batch_size

    def _say_changed(self, changed: list[str]) -> None:
        rank_zero_warn(f"The streams change from here on: data {'; '.join(changed)}.")

    # Pieces -----------------------------------------------------------------------------------------------------------

    def _training_streams(self) -> Streams:
        return self._cut("train", self.batch_size, self.length, whole=True)

    def _cut(self, split: str, rows: int, length: int, *, whole: bool) -> Streams:
        tokens = self.tokens(split)
        needed = rows + 1 if whole else 2
        if len(tokens) < needed:
            raise UserError(
                f"{self.name}: the split {split} has {len(tokens)} tokens, fewer than {needed} for {rows} streams. "
                "Lower data.batch_size or use a longer text."
            )
        return Streams(tokens, rows=min(rows, len(tokens) - 1), length=length, whole=whole)


class TrainBatches:
    """Endless: micro-batch after micro-batch of this process's rows, beginning at the row count `start`.

    Row count p stands for row p % rows of the streams, in step p // rows; a step takes every stream one segment
    further, and after the last segment the streams begin anew. Of a joint micro-batch, process k of W takes the k-th
    contiguous W-th.
    """

    def __init__(self, streams: Streams, *, micro: int, rank: int, world_size: int, start):
        self.streams, self.micro, self.rank, self.share, self.start = streams, micro, rank, micro // world_size, start

    def __iter__(self) -> Iterator[dict[str, Tensor | bool]]:
        count = self.start() if callable(self.start) else self.start
        while True:
            step, row = divmod(count, self.streams.rows)
            number = step % self.streams.segments
            rows = np.arange(self.share) + row + self.rank * self.share
            tokens, targets = self.streams.segment(number, rows)
            yield {"tokens": tokens, "targets": targets, "first": number == 0}
            count += self.micro
