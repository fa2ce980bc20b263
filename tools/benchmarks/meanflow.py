"""One MeanFlow training step against a flow-matching step: what the total derivative costs, ours and the usual way."""

import argparse
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.losses.meanflow import MeanFlowLoss

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTION = """\
One training step (loss, backward, Adam) with random images, the same weights and times for all variants.
  flow matching    r = t in all samples: one forward and one backward pass
  full-batch jvp   the usual MeanFlow step, restated from the paper (arXiv 2505.13447, algorithm 1) and its PyTorch
                   release: torch.func.jvp over the whole batch, its derivative detached
  ours             common.losses.meanflow: the derivative of the samples with r < t alone, without a graph and without
                   the products by the zero tangents of the weights, then the ordinary pass
  ours, all rows   the same with skip_equal=false
A case is a network and the share of samples with r < t: unet is the CIFAR-10 U-Net of MeanFlow (55.93 million
parameters, dropout 0.2), dit is DiT-S/4 (33.14 million) on 32x32 latents of four channels, mlp the network of
meanflow_tiny with its batch of 128 independent of --batch."""

FLOW, USUAL, OURS, ALL = "flow matching", "full-batch jvp", "ours", "ours, all rows"
NETS = ("unet", "dit", "mlp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["unet", "dit"], help="which networks")
    parser.add_argument("--shares", type=int, nargs="+", default=[25, 75], help="per cent of the samples with r < t")
    parser.add_argument("--all-rows", action="store_true", help=f"a row with {ALL}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--autocast", choices=["bf16"], help="ordinary passes in bfloat16; derivatives stay float32")
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand parameters: only a try-out")


def variants(options: argparse.Namespace) -> list[str]:
    return [FLOW, USUAL, OURS, *([ALL] if options.all_rows else [])]


def cases(options: argparse.Namespace) -> list[str]:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    for share in options.shares:
        if not 0 <= share <= 100:
            raise UserError(f"--shares are per cent, 0 to 100, got {share}.")
    return [f"{name} {share} %" for name in options.nets for share in options.shares]


def make(variant: str, options: argparse.Namespace) -> Callable[[str, int], dict]:
    built = {}

    def step(case: str, repeat: int) -> dict:
        name, share = case.split()[:2]
        if name not in built:
            built.clear()  # one network at a time
            built[name] = Step(variant, name, options)
        return built[name](int(share), repeat)

    return step


class Step:
    """Loss, backward pass and Adam of one network."""

    def __init__(self, variant: str, name: str, options: argparse.Namespace):
        self.variant, self.device = variant, torch.device(options.device)
        self.batch = 128 if name == "mlp" else options.batch
        self.half = options.autocast == "bf16"
        self.net = build(name, options.tiny).to(self.device)
        if name == "unet" and self.device.type == "cpu":
            self.net.to(memory_format=torch.channels_last)  # as the runtime does there
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)
        self.loss = MeanFlowLoss(power=0.75, skip_equal=variant != ALL)

    def __call__(self, share: int, repeat: int) -> dict:
        x, e, t, r, labels = draw(self.net, self.batch, share, repeat)
        if self.variant == FLOW:
            r = t
        rows = int((r < t).sum())
        if self.net.label_dim:
            labels = labels.to(self.device)
        x, e = x.to(self.device), e.to(self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began, cpu = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        conditions = {"class_labels": labels} if self.net.label_dim else {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            if self.variant == USUAL:
                loss = usual(self.net, x, e, t.to(self.device), r.to(self.device), conditions)
            else:
                loss = self.loss(self.net, x, t, r, e, **conditions).loss.mean()
        loss.backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            memory = torch.cuda.max_memory_allocated() / 2**20
            return {"rows": rows, "images/s": self.batch / seconds, "gpu MiB": memory}
        return {"rows": rows, "cpu ms": (time.process_time() - cpu) * 1e3}


def usual(net: nn.Module, x: Tensor, e: Tensor, t: Tensor, r: Tensor, conditions: dict) -> Tensor:
    """The loss with the derivative of the whole batch, both halves of the pass with a graph."""
    wide = lambda time: time.view(-1, 1, 1, 1)
    z, v = (1 - wide(t)) * x + wide(t) * e, e - x
    directions = (v, torch.ones_like(t), torch.zeros_like(r))
    with torch.autocast(x.device.type, enabled=False):  # as the release does
        u, dudt = torch.func.jvp(lambda z, t, r: net(z, t, r, **conditions), (z, t, r), directions)
        squared = (u - (v - wide(t - r) * dudt).detach()).square().flatten(1).sum(1)
        return (squared / (squared.detach() + 1e-3) ** 0.75).mean()


def draw(net: nn.Module, batch: int, share: int, repeat: int):
    """x, e, t, r, one-hot labels on the CPU; exactly `share` per cent of the rows have r < t."""
    generator = torch.Generator().manual_seed(repeat)
    shape = (batch, net.img_channels, net.img_resolution, net.img_resolution)
    x, e = (torch.randn(shape, generator=generator) for _ in range(2))
    t = torch.rand(batch, generator=generator) * 0.9 + 0.1
    r = torch.where(torch.arange(batch) < round(batch * share / 100), t * 0.5, t)
    labels = nn.functional.one_hot(torch.arange(batch) % max(net.label_dim, 1), max(net.label_dim, 1)).float()
    return x, e, t, r, labels


@cache
def configuration(name: str):
    import hydra
    from omegaconf import OmegaConf

    from common.runtime.cli.launch import register_resolvers

    register_resolvers()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(f"net/{name}"), resolve=True)["net"]


def build(name: str, tiny: bool) -> nn.Module:
    """The network with weights as after training: no layer at zero, which would make derivatives vanish."""
    from hydra.utils import instantiate

    torch.manual_seed(0)
    if name == "unet":
        chosen = configuration("meanflow_unet")
        chosen["model"] |= {"augment_dim": 0}
        if tiny:
            chosen["model"] |= {"img_resolution": 8, "model_channels": 16, "num_blocks": 1, "attn_resolutions": [4]}
            chosen["model"] |= {"channel_mult": [1, 1]}
    elif name == "mlp":
        chosen = configuration("meanflow_mlp")
        chosen["model"] |= {"depth": 3}
    else:
        chosen = {"_target_": "common.nets.dit.DiT", "img_resolution": 32, "in_channels": 4, "patch_size": 4,
                  "width": 384, "depth": 12, "num_heads": 6, "label_dim": 1000}  # fmt: skip
        if tiny:
            chosen |= {"img_resolution": 8, "width": 32, "depth": 2, "num_heads": 2, "label_dim": 10}
    net = instantiate(chosen).train()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.add_(torch.randn_like(p) / math.sqrt(2 * p[0].numel()))
    return net


def remarks(rows: list[dict]) -> list[str]:
    """Time of ours and of the usual way relative to flow matching, per case."""
    lines = []
    for row in rows:
        if row["variant"] != OURS:
            continue
        theirs = next(r for r in rows if r["variant"] == USUAL and all(r[k] == row[k] for k in ("case", "threads")))
        lines.append(
            f"{row['case']}, {row['threads']} thread{'s' * (row['threads'] > 1)}: {row['ratio']:.2f}x a flow-matching "
            f"step, against {theirs['ratio']:.2f}x the usual way."
        )
    return lines
