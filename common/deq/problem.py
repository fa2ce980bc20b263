"""The map of an equilibrium for the solvers: it takes and returns matrices (B, D) and counts its calls."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from common.deq.structure import Layout, take_rows
from common.errors import UserError


class Problem:
    """The map on matrices (B, D): `problem(z)`, `problem.jvp(z, v)`. Counts its calls; rows can be taken out."""

    def __init__(self, fn: Callable, layout: Layout, args: Sequence | None, static: bool = False):
        self.fn, self.layout, self.args = fn, layout, tuple(args or ())
        self.static = static  # shapes only: no value may be looked at
        self.known: tuple[Tensor, Tensor] | None = None  # (z, fn(z)) that a solver's step has already evaluated
        self.calls = 0  # of fn, whatever the batch size
        self.samples = 0  # samples evaluated by those calls
        self.autocast: Callable | None = None  # creates the autocast context of fn; None: the surrounding one

    def __call__(self, z: Tensor) -> Tensor:
        if self.known is not None and self.known[0] is z:
            fz, self.known = self.known[1], None
            return fz
        self.calls += 1
        self.samples += len(z)
        version = None if z.is_inference() else z._version
        if self.autocast is None:
            image = self.fn(self.layout.unpack(z), *self.args)
        else:
            with self.autocast():
                image = self.fn(self.layout.unpack(z), *self.args)
        if version is not None and z._version != version:
            raise UserError("fn wrote into its state in place. Return a new tensor: z * 0.5 instead of z.mul_(0.5).")
        return self.layout.pack_image(image, len(z))

    @contextmanager
    def only_fn_autocast(self, device: str) -> Iterator[None]:
        """Under autocast: fn runs in the lower precision, the solver's own products around it do not."""
        if not torch.is_autocast_enabled(device):
            yield
            return
        dtype, cache = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
        self.autocast = lambda: torch.autocast(device, dtype=dtype, cache_enabled=cache)
        with torch.autocast(device, enabled=False):
            yield
        self.autocast = None

    def jvp(self, z: Tensor, v: Tensor) -> Tensor:
        """J(z) v by forward-mode differentiation, (B, D). Counts as one call."""
        if z.is_inference():  # in inference mode forward-mode derivatives are silently zero before torch 2.12
            with torch.inference_mode(False):
                return self.jvp(z.clone(), v.clone())
        with warnings.catch_warnings():  # torch's own forward rules use a deprecated compiler
            warnings.simplefilter("ignore", FutureWarning)
            return torch.func.jvp(self, (z,), (v,))[1].to(v.dtype)  # without dimensions, torch may widen it

    def take(self, rows: Tensor) -> None:
        self.args = take_rows(self.args, rows)
