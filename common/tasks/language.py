"""Language modelling with an equilibrium network: next-token loss, memory carried from segment to segment, text."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from common import limits
from common.deq.layers import reset
from common.errors import UserError
from common.files import write_text
from common.nets.deq_transformer import Memory
from common.runtime.training.equilibrium import EquilibriumModule
from common.runtime.training.seeding import derive_seed

STORED = "language_memory"  # key in a checkpoint


class Language(EquilibriumModule):
    """Cross-entropy of the next token; evaluated by loss (nats per token), perplexity and bits per byte of text.

    net          `common.nets.deq_transformer.DEQTransformer`: has `segment`, `nll`, `log_probs`, `blank_memory`
    length       positions of a training segment; used for planning only
    prompt       text every sample begins with, at least one token of the vocabulary
    text_length  tokens written after it
    temperature  divides the log-probabilities; 0 takes the likeliest token
    top_k        only the k likeliest tokens are drawn from, None: all
    optimizer, schedule, correction   see `EquilibriumModule`

    Memory. A segment attends to the states solved for the one before, with the weights of the step before: that is the
    published recipe, and no function of the position in the text. It is therefore part of a checkpoint (batch x memory
    x (D + 2 H Dh) numbers, 94 MB in the WikiText-103 setting beside 1.2 GB of weights and moments), gathered from all
    processes in the order of the streams, so that a run resumes bit by bit, on another number of processes too.
    Recomputing it from the tokens would need no storage, but gives other states than the run had.
    """

    reads = "text"
    unit = "segments"

    def __init__(
        self,
        *,
        net: nn.Module,
        length: int,
        prompt: str,
        text_length: int,
        temperature: float,
        top_k: int | None,
        optimizer: Callable,
        schedule: Callable | None,
        correction: Callable | None,
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule, correction=correction)
        for name, value in (("length", length), ("text_length", text_length), ("top_k", top_k)):
            if value is not None:
                limits.whole(f"project.{name}", value, least=1)
        limits.number("project.temperature", temperature, least=0, hint="Set it to 1.0 to sample the model.")
        if not prompt:
            raise UserError('project.prompt must hold at least one token. Set project.prompt="\\n" for a new line.')
        self.length, self.prompt, self.text_length = length, prompt, text_length
        self.temperature, self.top_k = temperature, top_k
        self._memory: dict[int, Memory] = {}  # of training, by place of the micro-batch within its optimiser step
        self._stored: dict[str, Tensor] | None = None  # from a checkpoint, not handed out yet
        self._reading: Memory | None = None  # of evaluation

    # Training and evaluation ------------------------------------------------------------------------------------------

    def outputs(self, batch: dict) -> list[Tensor]:
        """Hidden states (B, T, D), one per state; continues the streams of the batches before unless `first`."""
        if not self.training:
            memory = None if batch["first"] else self._reading
            segment = self.net.segment(batch["tokens"], memory)
            self._reading = segment.memory
            return segment.hidden
        parts = 1 if self._trainer is None else self.trainer.accumulate_grad_batches
        place = self.micro_step % parts
        if self._stored is not None:
            self._memory, self._stored = self._hand_out(self._stored, parts, len(batch["tokens"])), None
        memory = None if batch["first"] else self._memory.get(place)
        segment = self.net.segment(batch["tokens"], memory)
        self._memory[place] = segment.memory
        return segment.hidden

    def criterion(self, output: Tensor, batch: dict) -> Tensor:
        """Mean cross-entropy in nats of hidden states (B, T, D) against `batch["targets"]` (B, T)."""
        return self.net.nll(output, batch["targets"]).mean()

    def evaluation_step(self, batch: dict) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums and counts over one batch: `loss` per token, `bits_per_byte` per byte of text."""
        targets = batch["targets"]
        total = self.net.nll(self.outputs(batch)[-1], targets).double().sum()
        return {"loss": (total, (targets >= 0).sum()), "bits_per_byte": (total / math.log(2), batch["bytes"].sum())}

    def finalise(self, means: dict[str, float]) -> dict[str, float]:
        """Adds `perplexity` = exp(loss)."""
        return means | {"perplexity": math.exp(min(means["loss"], 700.0))}

    # Memory in checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """The memory of every stream in the order of the streams, (batch, M, ...), on the CPU."""
        if self._memory:
            places = [self._memory[place] for place in sorted(self._memory)]
            checkpoint[STORED] = {
                name: torch.cat([self._joint(getattr(memory, name)).cpu() for memory in places])
                for name in Memory._fields
            }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._memory, self._stored = {}, checkpoint.get(STORED)

    def _joint(self, rows: Tensor) -> Tensor:
        """Rows (b, ...) of every process one after the other."""
        many = self._trainer is not None and self.trainer.world_size > 1
        return self.all_gather(rows).flatten(0, 1) if many else rows

    def _hand_out(self, stored: dict[str, Tensor], parts: int, share: int) -> dict[int, Memory]:
        """This process's rows of each micro-batch of a step; nothing when the streams are not those stored."""
        rank, world = (0, 1) if self._trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        rows = len(stored["states"])
        if rows != parts * world * share:
            rank_zero_warn(
                f"The checkpoint remembers {rows} streams, this run reads {parts * world * share}: its memory is blank."
            )
            return {}
        taken = {name: part.unflatten(0, (parts, world, share))[:, rank] for name, part in stored.items()}
        return {p: Memory(*(taken[name][p].to(self.device) for name in Memory._fields)) for p in range(parts)}

    # What the runtime asks for ----------------------------------------------------------------------------------------

    def fake_batch(self, samples: int) -> dict[str, Tensor | bool]:
        """`tokens`, `targets` (N, length), in the middle of a text: the memory is full."""
        self._memory[0] = self.net.blank_memory(samples)
        zeros = torch.zeros(samples, self.length, dtype=torch.int64)
        return {"tokens": zeros, "targets": zeros.clone(), "first": False}

    def show(self, data, folder: Path, *, samples: int, seed: int) -> list[Path]:
        """`text.txt`: `samples` texts that begin with the prompt; text i depends on (seed, i) alone."""
        return [self._write(Path(folder) / "text.txt", data, samples, seed)]

    def preview(self, data, stem: Path, *, samples: int, seed: int) -> list[Path]:
        """The same into `<stem>.txt`."""
        return [self._write(Path(f"{stem}.txt"), data, samples, seed)]

    def _write(self, path: Path, data, samples: int, seed: int) -> Path:
        vocabulary = data.vocabulary
        prompt = torch.tensor(vocabulary.encode(self.prompt), device=self.device)
        texts = self.generate(prompt, samples=samples, seed=seed).tolist()
        whole = [vocabulary.decode([*prompt.tolist(), *tokens]).strip("\n") for tokens in texts]
        write_text(path, "".join(f"--- text {number}\n{text}\n\n" for number, text in enumerate(whole)))
        return path

    @torch.no_grad()
    def generate(self, prompt: Tensor, *, samples: int, seed: int) -> Tensor:
        """Tokens (samples, text_length) that follow `prompt` (P,), in the module's mode; one solve per token, over one
        position: the states of earlier ones are remembered."""
        uniform = torch.stack([
            torch.rand(self.text_length, generator=torch.Generator().manual_seed(derive_seed(seed, "text", number)),
                       dtype=torch.float64)
            for number in range(samples)
        ])  # fmt: skip
        reset(self.net)  # normalised weights once for all tokens
        tokens, memory, written = prompt.expand(samples, -1), None, []
        for column in uniform.unbind(1):
            segment = self.net.segment(tokens, memory)
            memory = segment.memory
            log_probs = self.net.log_probs(segment.hidden[-1][:, -1])
            tokens = choose(log_probs.cpu(), column, self.temperature, self.top_k).to(prompt.device).unsqueeze(1)
            written.append(tokens)
        return torch.cat(written, dim=1)


def choose(log_probs: Tensor, uniform: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Tokens (N,) drawn from log-probabilities (N, V) by inverting the distribution at `uniform` (N,) in [0, 1).

    temperature 0 takes the likeliest; top_k keeps the k likeliest (None: all).
    """
    if temperature == 0:
        return log_probs.argmax(dim=-1)
    kept = min(top_k or log_probs.shape[-1], log_probs.shape[-1])
    values, order = log_probs.double().topk(kept, dim=-1)
    cumulative = (values / temperature).softmax(dim=-1).cumsum(dim=-1)
    rank = (cumulative <= uniform.unsqueeze(-1)).sum(dim=-1, keepdim=True).clamp(max=kept - 1)
    return order.gather(-1, rank).squeeze(-1)
