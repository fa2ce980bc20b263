"""The files of a new paper, ready to run: a small denoiser on digits under the new name, to be turned into the paper.

python -m tools.new_paper sct --title "Stable Consistency Tuning" --venue "ICLR 2025 workshop" --arxiv 2410.18958

Writes projects/<slug>/{__init__.py,module.py,README.md}, conf/project/<slug>.yaml, conf/experiment/<slug>_tiny.yaml,
conf/claim/<slug>.yaml and tests/projects/test_<slug>.py. Refuses to touch a file that exists.
"""

import argparse
import keyword
import re
import sys
from pathlib import Path

from common.errors import UserError
from common.files import write_text
from tools import zoo

ROOT = Path(__file__).resolve().parent.parent

INIT = '''"""@Class@: @title@ (@venue@), arXiv @arxiv@.

Family: @family@.
"""
'''

MODULE = '''"""@title@. The algorithm, to be replaced by the paper's own in six to ten lines:

    for y in data:
        sigma ~ exp(N(mean, std^2));  eps ~ N(0, I)
        minimise weight(sigma) |net(y + sigma eps, sigma) - y|^2
"""

from collections.abc import Callable

from torch import Tensor, nn

from common.runtime.training.generative import GenerativeModule


class @Class@(GenerativeModule):
    """@title@ (arXiv @arxiv@). Starts as denoising score matching; `training_step` is where the paper goes.

    net        preconditioned network (`common.diffusion.precond`)
    loss       (net, y, sigma, eps, class_labels) -> per-sample loss (B,)
    time       sampler of the noise level sigma, data units (`common.diffusion.time`)
    optimizer, schedule   see `GenerativeModule`
    """

    def __init__(
        self, *, net: nn.Module, loss: Callable, time: Callable, optimizer: Callable, schedule: Callable | None
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule)
        self.loss = loss
        self.time = time

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Mean loss of one micro-batch; logs `train/loss`."""
        y = batch["image"]
        draws = self.draws()
        sigma = draws.apply("sigma", self.time, len(y)).to(y.device, non_blocking=True)
        eps = draws.normal("eps", y)
        loss = self.loss(self.net, y, sigma, eps, class_labels=self.one_hot(batch["label"])).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss
'''

CARD = """# @title@

@venue@, arXiv @arxiv@. Code: `projects/@slug@`, configuration: `conf/project/@slug@.yaml`.

## Idea

A network learns to remove noise of every level from images. These five lines say what the paper does instead.

<!-- zoo:headline -->
<!-- /zoo -->

## Equations

| paper | equation | code |
|---|---|---|
| EDM (arXiv 2206.00364) Eq. 8 | w norm(net(y + sigma eps) - y)² | `projects/@slug@/module.py:@Class@.training_step` |

## Commands

```
python -m projects.run +experiment=@slug@_tiny
make claim-@slug@
```

<!-- zoo:experiments -->
<!-- /zoo -->

## Published and ours

<!-- zoo:results -->
<!-- /zoo -->

## Not covered

- No published setting was trained.

## Where paper and code disagree

Nothing known.
"""

PROJECT = """# @title@ (arXiv @arxiv@).
defaults:
  - /net@net: edm_mlp
  - /optimizer@optimizer: adam
  - /schedule@schedule: constant

_target_: projects.@slug@.module.@Class@
loss:
  _target_: common.losses.denoising.DenoisingLoss
  weight: edm             # (sigma^2 + sd^2) / (sigma sd)^2
  uncertainty: false      # true: EDM2's learned weighting
  reduction: sum          # over pixels
  sigma_data: ${project.net.sigma_data}   # sd, data units
time:
  _target_: common.diffusion.time.LogNormal
  mean: -1.2              # of ln sigma
  std: 1.2                # of ln sigma
"""

EXPERIMENT = """# @package _global_
# @title@ on 8x8 digits: the small version, minutes on 2 CPU cores
# python -m projects.run +experiment=@slug@_tiny
defaults:
  - /sampler@evaluate.samplers.heun: heun
  - override /project: @slug@
  - override /data: digits
  - override /trainer: cpu
  - override /evaluate: digits
  - override /sampler@sample.sampler: heun

data:
  batch_size: 128
trainer:
  max_steps: 4000
  log_every_n_steps: 20
ema:
  profiles:
    ema:
      decay: 0.999
evaluate:
  every_n_steps: 1000
speed:
  threads: 1                # faster than two for a network this small
plan:
  parameters: 190_784
"""

CLAIM = """# python -m tools.claim @slug@      (make claim-@slug@)
claim: Generated digits come close to real ones, which stay closer
source: "arXiv @arxiv@, restated on 8x8 digits"
seeds: [1, 2, 3]

runs:
  ours: {experiment: @slug@_tiny}

measures:
  ours: {run: ours, metric: test/fd_digits_heun, says: "@slug@, 18 Heun steps"}
  floor: {run: ours, metric: test/fd_digits_floor, says: "held-out real images"}

relations:
  - {left: floor, op: "<=", factor: 1, right: ours, says: "real images are at least as close as generated ones"}
"""

TEST = '''"""@title@: its equation on a case with a known answer, and two steps of the small experiment."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.runtime.cli import launch
from common.weights.build import build


# One case of the paper's equation, small enough to compute by hand. The first test asserts it, and is reported as
# unfinished (an expected failure) while one of the two is None.
CASE = None  # inputs of the loss beside the network: {"y": (B, C, H, W), "sigma": (B,), "noise": (B, C, H, W)} as lists
ANSWER = None  # what the equation gives for a network that returns zeros, (B,) as a list


@pytest.fixture
def module(repo):
    launch.register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(repo / "conf")):
        cfg = compose("config", overrides=["+experiment=@slug@_tiny"])
    return build(OmegaConf.to_container(cfg.project, resolve=True))


def batch(module, size=4):
    shape = (size, module.net.img_channels, module.net.img_resolution, module.net.img_resolution)
    return {"image": torch.rand(shape) * 2 - 1, "label": torch.zeros(size, dtype=torch.int64)}


def test_the_equation_on_a_case_with_a_known_answer(module):
    if CASE is None or ANSWER is None:
        pytest.xfail("unfinished: fill in CASE and ANSWER of tests/projects/test_@slug@.py")

    def zeros(x, sigma, **conditions):
        return torch.zeros_like(x)

    found = module.loss(zeros, **{name: torch.tensor(values, dtype=torch.float64) for name, values in CASE.items()})
    torch.testing.assert_close(found, torch.tensor(ANSWER, dtype=torch.float64))


def test_two_steps_change_the_weights_and_stay_finite(module):
    optimizer = module.configure_optimizers()
    optimizer = optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    before = [value.clone() for value in module.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        loss = module.training_step(batch(module), 0)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert all(value.isfinite().all() for value in module.parameters())
    assert any(not torch.equal(new, old) for new, old in zip(module.parameters(), before))


def test_gradient_reaches_the_network_and_not_the_images(module):
    data = batch(module)
    module.training_step(data, 0).backward()
    assert any(value.grad is not None and value.grad.abs().sum() > 0 for value in module.net.parameters())
    assert data["image"].grad is None
'''

FILES = {
    "projects/{slug}/__init__.py": INIT,
    "projects/{slug}/module.py": MODULE,
    "projects/{slug}/README.md": CARD,
    "conf/project/{slug}.yaml": PROJECT,
    "conf/experiment/{slug}_tiny.yaml": EXPERIMENT,
    "conf/claim/{slug}.yaml": CLAIM,
    "tests/projects/test_{slug}.py": TEST,
}


def new_paper(
    slug: str, *, title: str, venue: str, arxiv: str, family: str = zoo.OTHER, root: Path = ROOT
) -> list[Path]:
    """Writes the files and returns them. Raises UserError for a bad name or number, or when a file exists."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", slug) or keyword.iskeyword(slug):
        raise UserError(f"slug must be lower-case words joined by _, got {slug!r}. For instance: stable_tuning.")
    if not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
        raise UserError(f"arxiv must look like 2406.14548, got {arxiv!r}.")
    for field, text in (("title", title), ("venue", venue), ("family", family)):
        if not text.strip() or '"' in text or "\n" in text or "\\" in text:
            raise UserError(f"{field} must be one line without double quotes or backslashes, got {text!r}.")
    if "(" in venue or ")" in venue:
        raise UserError(f"venue must be without brackets, got {venue!r}. For instance: ICLR 2025.")
    files = {root / name.format(slug=slug): text for name, text in FILES.items()}
    there = [path.relative_to(root).as_posix() for path in files if path.exists()]
    if there:
        raise UserError(f"{', '.join(there)} exists already; nothing was written. Choose another slug.")
    words = {"@slug@": slug, "@Class@": class_name(slug), "@title@": title, "@venue@": venue, "@arxiv@": arxiv}
    words["@family@"] = family.rstrip(".")
    for path, text in files.items():
        for marker, word in words.items():
            text = text.replace(marker, word)
        write_text(path, text)
    return list(files)


def class_name(slug: str) -> str:
    """CamelCase of the slug: deq_flow -> DeqFlow."""
    return "".join(part.capitalize() for part in slug.split("_"))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.new_paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slug", help="short name used everywhere, for instance deq_flow")
    parser.add_argument("--title", required=True)
    parser.add_argument("--venue", required=True, help="for instance 'ICLR 2025'")
    parser.add_argument("--arxiv", required=True, help="for instance 2406.14548")
    parser.add_argument("--family", default=zoo.OTHER, help="heading it stands below in README.md")
    args = parser.parse_args(argv)
    try:
        files = new_paper(args.slug, title=args.title, venue=args.venue, arxiv=args.arxiv, family=args.family)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    for path in files:
        print(f"wrote  {path.relative_to(ROOT)}")
    print(f"try    python -m projects.run +experiment={args.slug}_tiny trainer.max_steps=20")
    print(f"test   python -m pytest -rx tests/projects/test_{args.slug}.py")
    print("to do  CASE and ANSWER in that test; until then its first test is reported as unfinished")
    print("list   python -m tools.zoo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
