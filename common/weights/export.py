"""A trained network as two files that load without Hydra, and back.

    from common.weights.export import load
    model = load("outputs/my_run/export")
    images = model.sample(16, seed=0)

`model.safetensors` holds the averaged weights under the network's own names, `config.json` the `_target_` trees of the
network and the sampler and where they come from; each has a `.sha256` beside it.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import (
    atomic,
    checksum_path,
    read_json,
    verify_checksum,
    with_numbers,
    write_checksum,
    write_json,
)  # fmt: skip
from common.targets import EXPORT
from common.weights.build import build
from common.weights.load import load_into, load_tensors

FORMAT = "onestep-export-1"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def export(
    path_dir: str | Path, module: nn.Module, network_config: Mapping, *, meta: Mapping, sampler: Mapping | None = None
) -> Path:
    """Writes `module` and the plain-data tree that rebuilds it to the folder `path_dir`; returns the folder.

    network_config  `_target_` tree of the preconditioned network, plain Python data
    sampler         `_target_` tree of its sampler, or None
    meta            plain data: experiment, step, average, commit, published numbers
    Each file is replaced in one step, the configuration last. Raises UserError when the tree does not rebuild a network
    with the tensors of `module`, when something in it is no plain data, or when the folder cannot be written.
    """
    tensors = module.state_dict()
    with torch.device("meta"):
        rebuilt = build(network_config, allowed=EXPORT)
    _compare(tensors, rebuilt)
    return write_export(path_dir, tensors, network_config, meta=meta, sampler=sampler)


def write_export(
    path_dir: str | Path,
    tensors: Mapping[str, Tensor],
    network_config: Mapping,
    *,
    meta: Mapping,
    sampler: Mapping | None = None,
) -> Path:
    """`export` for tensors that belong to no module yet; the caller has checked that they fit `network_config`."""
    from safetensors.torch import save_file

    folder = Path(path_dir)
    config = {"format": FORMAT, "network": _plain(network_config, "network"), "sampler": _plain(sampler, "sampler")}
    config["meta"] = _plain(meta, "meta")
    ready = {name: value.detach().to("cpu").contiguous().clone() for name, value in tensors.items()}
    with atomic(folder / WEIGHTS) as tmp:
        save_file(ready, tmp, metadata={"format": "pt"})
        # Until here (a full disk, say) an older export is intact. From here on an interrupted export must not look
        # finished: the old configuration goes before the new weights come, the new one comes last.
        for old in (folder / CONFIG, checksum_path(folder / CONFIG), checksum_path(folder / WEIGHTS)):
            old.unlink(missing_ok=True)
    config["weights_sha256"] = write_checksum(folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    write_checksum(folder / CONFIG)
    return folder


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A loaded export. `net` is the network in eval mode: `net(x, sigma) -> denoised image` where it is a denoiser."""

    net: Any
    sampler: Any
    config: dict
    folder: Path

    @property
    def meta(self) -> dict:
        """Experiment, step, average, commit, published numbers; of a velocity also `noise_scale` and `guidance`."""
        return self.config["meta"]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int = 0,
        labels: Tensor | int | None = None,
        batch_size: int = 64,
        sampler: Any = None,
        first: int = 0,
    ) -> Tensor:
        """Images (n, C, H, W) in [-1, 1] up to the network's own overshoot, float32 on the CPU.

        seed, first  image i is drawn from (seed, first + i) alone: the same whatever n and batch_size
        labels       (n,) class indices, or one index for all; None = none for an unconditional network, else one
                     class per image, drawn from (seed, first + i)
        sampler      another sampler object; None = the exported one
        Raises UserError for n < 1, batch_size < 1, labels that do not fit, or an export without sampler.
        """
        from common.diffusion.sample import ImageNoise, noise_shape

        for field, value in (("n", n), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{field} must be a whole number >= 1, got {value!r}.")
        sampler = sampler or self.sampler
        if sampler is None:
            raise UserError(f"{self.folder} was exported without a sampler. Give one: sample(n, sampler=...).")
        classes = self._classes(n, labels)
        device = next(self.net.parameters()).device
        images = []
        for start in range(0, n, batch_size):
            rows = range(start, min(start + batch_size, n))
            noise = ImageNoise(seed=seed, indices=[first + i for i in rows], shape=noise_shape(self.net), device=device)
            hot = None
            if self.net.label_dim:
                chosen = noise.labels(self.net.label_dim) if classes is None else classes[list(rows)].to(device)
                hot = nn.functional.one_hot(chosen, self.net.label_dim).float()
            images.append(sampler(self._bound(sampler, hot), noise.z, noise.noise).float().cpu())
        return torch.cat(images)

    def _bound(self, sampler, class_labels: Tensor | None):
        """The network as the sampler calls it: a denoiser D(x, sigma), or for flows a velocity u(z, t, r).

        Noise scale and trained guidance scales are those of the export; where it has none (official weights do not
        say), every scale of at least 1 is taken.
        """
        from common.diffusion.guidance import BoundVelocity, Conditional
        from common.diffusion.sample import AverageVelocitySteps, FlowEuler

        if not isinstance(sampler, AverageVelocitySteps | FlowEuler):
            return Conditional(net=self.net, class_labels=class_labels)
        guided = "omega" in inspect.signature(self.net.forward).parameters
        return BoundVelocity(
            net=self.net, class_labels=class_labels, noise_scale=self.meta.get("noise_scale", 1.0),
            guidance=self.meta.get("guidance", (1.0, math.inf) if guided else None),
        )  # fmt: skip

    def _classes(self, n: int, labels) -> Tensor | None:
        count = self.net.label_dim
        if labels is None:
            return None
        if count == 0:
            raise UserError("labels were given, but this network is unconditional. Leave labels out.")
        classes = torch.as_tensor(labels, dtype=torch.int64).flatten()
        classes = classes.expand(n) if classes.numel() == 1 else classes
        if classes.numel() != n or classes.min() < 0 or classes.max() >= count:
            raise UserError(f"labels must be {n} class indices from 0 to {count - 1}, got {labels!r}.")
        return classes


def load(path_dir: str | Path, *, device: str = "cpu") -> Exported:
    """The network and sampler of an export folder; nothing in it is executed beyond building them.

    Raises UserError that names the file when one is missing, damaged, or names something other than networks and
    samplers.
    """
    folder = Path(path_dir)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no finished export: {CONFIG} is missing. Run the experiment with task=export.")
    if verify_checksum(folder / CONFIG) is False:
        raise UserError(f"{folder / CONFIG} is damaged or was changed. Export again, or delete its .sha256.")
    config = with_numbers(read_json(folder / CONFIG))
    if not isinstance(config, dict) or config.get("format") != FORMAT or "network" not in config:
        raise UserError(f"{folder / CONFIG} is not of the format {FORMAT}. Export again with this version.")
    tensors = load_tensors(folder)
    # Built on a real device, not on meta: buffers that are no part of the weights must hold their values. The
    # initial values are overwritten at once; the user's random state is restored.
    with torch.random.fork_rng(devices=[]):
        net = build(config["network"], allowed=EXPORT)
    _compare(tensors, net, name=str(folder / WEIGHTS))
    load_into(net, tensors, prefix="", name=str(folder / WEIGHTS))
    sampler = build(config["sampler"], allowed=EXPORT) if config.get("sampler") else None
    config.setdefault("meta", {})
    return Exported(net=net.to(device).eval().requires_grad_(False), sampler=sampler, config=config, folder=folder)


def _compare(tensors: Mapping[str, Tensor], net: nn.Module, name: str = "The network to export") -> None:
    want, have = net.state_dict(), dict(tensors)
    wrong = [key for key in [*want, *have] if key not in want or key not in have or want[key].shape != have[key].shape]
    if wrong:
        shapes = [tuple(side[wrong[0]].shape) if wrong[0] in side else "absent" for side in (have, want)]
        raise UserError(
            f"{name} does not fit its configuration: {len(set(wrong))} tensors differ, first {wrong[0]}: {shapes[0]} "
            f"in the weights, {shapes[1]} in the network built from the configuration."
        )


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}.{i}") for i, item in enumerate(value)]
    raise UserError(f"{where} is a {type(value).__name__}, not plain data. Give numbers, text, lists or dictionaries.")
