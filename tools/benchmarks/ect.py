"""One ECT training step of the CIFAR-10 network: ours against the procedure as published.

The published procedure is restated here in our own words, from the paper (arXiv 2406.14548, algorithm 1) and the
authors' release; network layers as in EDM (arXiv 2206.00364, appendix F) and its release.
"""

import argparse
import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTION = """\
One training step of ECT on the CIFAR-10 network, same weights, images and random times for all variants: draw t, two
passes, backward, non-finite gradients, RAdam, average of the weights.
  published   the authors' procedure restated: the plain network (grouped convolutions for resampling, einsum
              attention), dropout matched by saving and restoring the random state, the student pass first, then the
              whole batch through the teacher pass unless every r is 0, nan_to_num of target and gradients,
              torch.optim.RAdam with its defaults, one lerp and one copy per parameter for the average
  ours        what `python -m projects.run +experiment=ect_cifar10` runs: configuration, module, guard and averages
The t of a batch are spread over p(t), one in each of its equal parts: a small batch then holds the share of r = 0 that
the published batch of 128 holds (independent draws of 8 would spare the published code the teacher pass in 18 % of the
steps of stage 0; of 128, never)."""

PUBLISHED, OURS, LAYOUT, HALF, COMPILED = "published", "ours", "ours contiguous", "ours bf16", "ours compile"
TINY = [
    "project.net.model." + word
    for word in ("img_resolution=8", "model_channels=16", "channel_mult=[1,1]", "num_blocks=1", "attn_resolutions=[4]")
]
SETTINGS = {
    LAYOUT: ["speed.channels_last=false"],
    HALF: ["trainer.precision=bf16-mixed"],
    COMPILED: ["speed.compile=true"],
}  # overrides a user adds to the command
DECAY = 0.9999


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 4], help="stages of the schedule, 0 to 7")
    parser.add_argument("--contiguous", action="store_true", help="a row with speed.channels_last=false")
    parser.add_argument("--autocast", choices=["bf16"], help="a row with trainer.precision=bf16-mixed")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="a row with speed.compile=true; BACKEND: inductor (default), aot_eager, eager",
    )
    parser.add_argument("--tiny", action="store_true", help="a network of 16 channels at 8x8 instead: only a try-out")


def variants(options: argparse.Namespace) -> list[str]:
    chosen = {LAYOUT: options.contiguous, HALF: options.autocast, COMPILED: options.compile}
    return [PUBLISHED, OURS, *(name for name, wanted in chosen.items() if wanted)]


def cases(options: argparse.Namespace) -> list[str]:
    for stage in options.stages:
        if not 0 <= stage <= 7:
            raise UserError(f"--stages must be between 0 and 7, got {stage}. The published schedule has 8 stages.")
    return [f"stage {stage}" for stage in options.stages]


def make(variant: str, options: argparse.Namespace):
    words = TINY if options.tiny else ()
    if variant == PUBLISHED:
        return PublishedStep(build(compose(*words)), batch=options.batch)
    return our_step(*words, *SETTINGS.get(variant, ()), batch=options.batch, backend=options.compile)


def our_step(*words: str, batch: int, backend: str | None = None) -> "OurStep":
    """The step of `python -m projects.run +experiment=ect_cifar10 <words>`. backend: of torch.compile."""
    from common.runtime.training.speed import apply_speed

    cfg = compose(*words)
    module = build(cfg)
    apply_speed(module, cfg, backend=backend)
    return OurStep(module, cfg, batch=batch)


def compose(*words: str):
    """The configuration of `python -m projects.run +experiment=ect_cifar10 <words>`."""
    import hydra

    from common.runtime.cli.launch import register_resolvers

    register_resolvers()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("config", overrides=["+experiment=ect_cifar10", *words, "run.experiment=bench"])


def build(cfg) -> nn.Module:
    """The paper's module with weights as after training: no layer near zero."""
    from hydra.utils import instantiate

    torch.manual_seed(0)
    module = instantiate(cfg.project, _convert_="all").train()
    module.time = Spread(module.time.mean, module.time.std)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 4:
                p.add_(torch.randn_like(p) / math.sqrt(2 * p[0].numel()))
    return module


class Spread:
    """ln t ~ N(mean, std^2) as in the configuration, one t in each n-th part of the distribution."""

    def __init__(self, mean: float, std: float):
        self.mean, self.std = mean, std

    def __call__(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        part = (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
        return (torch.special.ndtri(part) * self.std + self.mean).exp().float()


def images(module: nn.Module, batch: int) -> Tensor:
    shape = (batch, module.net.img_channels, module.net.img_resolution, module.net.img_resolution)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def times(module: nn.Module, repeat: int, batch: int) -> Tensor:
    """t (batch,) of this repeat, the same for every variant."""
    module.context = replace(module.context, seed=repeat)
    return module.draws().apply("t", module.time, batch)


class OurStep:
    """The step as the runtime makes it: the module's training step, the guard, the configured optimiser, averages.

    Outside a Lightning Trainer, whose own loop costs microseconds; callbacks get a stand-in with what they read.
    """

    def __init__(self, module: nn.Module, cfg, *, batch: int):
        from hydra.utils import instantiate

        from common.runtime.training.guard import NonFiniteGuard

        self.module, self.autocast = module, cfg.trainer.precision == "bf16-mixed"
        self.batch = {"image": images(module, batch), "label": torch.zeros(batch, dtype=torch.long)}
        made = module.configure_optimizers()
        self.optimizer = made["optimizer"] if isinstance(made, dict) else made
        self.guard = NonFiniteGuard()
        self.averages = instantiate(cfg.ema, _convert_="all")
        self.trainer = SimpleNamespace(precision="32-true", global_step=0, callbacks=[])
        module.context = replace(module.context, samples_per_step=batch)
        self.averages.on_fit_start(self.trainer, module)

    def __call__(self, case: str, repeat: int) -> dict:
        module, trainer = self.module, self.trainer
        module.context = replace(module.context, seed=repeat)
        module.first_stage = int(case.split()[-1])
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            loss = module.training_step(self.batch, 0)
        self.guard.on_before_backward(trainer, module, loss)
        loss.backward()
        module.on_after_backward()
        self.guard.on_before_optimizer_step(trainer, module, self.optimizer)
        self.optimizer.step()
        trainer.global_step += 1
        self.averages.on_train_batch_end(trainer, module, None, self.batch, 0)
        r = module.loss.t_to_r(times(module, repeat, len(self.batch["image"])), module.stage)
        return {"teacher rows": float((r > 0).sum()) if module.loss.skip_zero else float(len(r))}


# ---------------------------------------------------------------------------------------------------------------------
# The published procedure


class PublishedStep:
    """One iteration of the authors' loop on one process without gradient accumulation or augmentation.

    module  ours: it gives the sizes, the initial weights and the times; it is not run
    """

    def __init__(self, module: nn.Module, *, batch: int):
        self.net = PublishedDenoiser(module.net.raw).train()
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = torch.optim.RAdam(self.net.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
        self.images = images(module, batch)
        self.times = lambda repeat: times(source, repeat, batch)
        # The module's weights are not needed any more; what draws the times is.
        source = copy.copy(module)
        source._modules = {}

    def __call__(self, case: str, repeat: int) -> dict:
        torch.manual_seed(repeat)
        self.optimizer.zero_grad(set_to_none=True)
        t = self.times(repeat).reshape(-1, 1, 1, 1)
        loss = published_loss(self.net, self.images, t, torch.randn_like(self.images), stage=int(case.split()[-1]))
        loss.mean().backward()
        for p in self.net.parameters():
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        self.optimizer.step()
        with torch.no_grad():
            for kept, p in zip(self.average.parameters(), self.net.parameters()):
                kept.copy_(p.detach().lerp(kept, DECAY))
        return {"teacher rows": float(len(t)) if published_r(t, int(case.split()[-1])).max() > 0 else 0.0}


def published_r(t: Tensor, stage: int, q: float = 2, k: float = 8, b: float = 1) -> Tensor:
    """r of the "sigmoid" schedule, shape of t."""
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) / q ** (stage + 1))).clamp(min=0)


def published_loss(net: nn.Module, y: Tensor, t: Tensor, eps: Tensor, *, stage: int) -> Tensor:
    """Losses (B,): y, eps (B, C, H, W); t (B, 1, 1, 1). Dropout is drawn from the global random state, twice alike."""
    r = published_r(t, stage)
    state = torch.get_rng_state()
    student = net(y + t * eps, t)
    target = y
    if r.max() > 0:
        torch.set_rng_state(state)
        with torch.no_grad():
            teacher = net(y + r * eps, r)
        live = r > 0
        target = live * torch.nan_to_num(teacher) + ~live * y
    squared = ((student - target) ** 2).flatten(1).sum(1)
    return squared.sqrt() / (t - r).flatten()


class PublishedDenoiser(nn.Module):
    """EDM's preconditioning (sigma_data = 0.5) around the plain DDPM++ network with the weights of `like`."""

    def __init__(self, like: nn.Module):
        super().__init__()
        self.model = PublishedUNet(like)
        self.model.load_state_dict(like.state_dict())

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        total = sigma**2 + 0.25
        out = self.model(x / total.sqrt(), sigma.log().flatten() / 4)
        return 0.25 / total * x + sigma * 0.5 / total.sqrt() * out


class PublishedConv(nn.Module):
    """Convolution after resampling with a grouped convolution, the way the release does it."""

    def __init__(self, cin: int, cout: int, kernel: int, up: bool = False, down: bool = False):
        super().__init__()
        self.up, self.down = up, down
        self.weight = nn.Parameter(torch.empty(cout, cin, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(cout))
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        if self.up:
            taps = (self.resample_filter * 4).tile([channels, 1, 1, 1])
            x = F.conv_transpose2d(x, taps, groups=channels, stride=2)
        if self.down:
            taps = self.resample_filter.tile([channels, 1, 1, 1])
            x = F.conv2d(x, taps, groups=channels, stride=2)
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class PublishedBlock(nn.Module):
    """Residual block of DDPM++, attention with one head."""

    def __init__(self, cin: int, cout: int, emb: int, dropout: float, up=False, down=False, attention=False):
        super().__init__()
        self.dropout, self.attention, self.cin = dropout, attention, cin
        self.norm0 = norm(cin)
        self.conv0 = PublishedConv(cin, cout, 3, up, down)
        self.affine = nn.Linear(emb, cout)
        self.norm1 = norm(cout)
        self.conv1 = PublishedConv(cout, cout, 3)
        self.skip = PublishedConv(cin, cout, 1, up, down) if up or down or cin != cout else None
        if attention:
            self.norm2 = norm(cout)
            self.qkv = PublishedConv(cout, 3 * cout, 1)
            self.proj = PublishedConv(cout, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        origin = x
        x = self.conv0(F.silu(self.norm0(x)))
        x = F.silu(self.norm1(x.add_(self.affine(emb)[:, :, None, None])))
        x = self.conv1(F.dropout(x, self.dropout, self.training))
        x = x.add_(origin if self.skip is None else self.skip(origin)) * math.sqrt(0.5)
        if self.attention:
            q, k, v = self.qkv(self.norm2(x)).reshape(x.shape[0], x.shape[1], 3, -1).unbind(2)
            weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(dim=2)
            mixed = torch.einsum("nqk,nck->ncq", weights, v)
            x = self.proj(mixed.reshape(x.shape)).add_(x) * math.sqrt(0.5)
        return x


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class PublishedUNet(nn.Module):
    """DDPM++ with the layer names, sizes and order of `like` (a `common.nets.unet.SongUNet`)."""

    def __init__(self, like: nn.Module):
        super().__init__()
        emb = like.map_layer0.out_features
        self.half = like.map_layer0.in_features // 2
        self.map_layer0 = nn.Linear(like.map_layer0.in_features, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for side, own in ((like.enc, self.enc), (like.dec, self.dec)):
            for name, layer in side.items():
                if hasattr(layer, "conv0"):
                    own[name] = PublishedBlock(
                        layer.in_channels,
                        layer.out_channels,
                        emb,
                        layer.dropout,
                        layer.conv0.up,
                        layer.conv0.down,
                        layer.num_heads > 0,
                    )
                elif name.endswith("norm"):
                    own[name] = norm(layer.weight.shape[0])
                else:
                    own[name] = PublishedConv(layer.in_channels, layer.out_channels, layer.kernel)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        frequencies = (1 / 10000) ** (torch.arange(self.half, dtype=torch.float32) / (self.half - 1))
        angles = noise.ger(frequencies.to(noise.dtype))
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, PublishedBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, PublishedBlock):
                x = layer(torch.cat([x, skips.pop()], dim=1) if x.shape[1] != layer.cin else x, emb)
            elif isinstance(layer, nn.GroupNorm):
                x = F.silu(layer(x))
            else:
                x = layer(x)
        return x
