"""Fixed-point solvers as small objects: init / step / terminate / finish. `common.deq.solve.solve` owns the loop.

Everything is per sample: each row of the matrices (B, D) has its own history, so a sample's path does not depend on the
batch it is in. A solver's state is a dict of tensors with leading dimension B: rows can be taken out of it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from common.deq.krylov import combine, dots, gmres
from common.errors import UserError, nearest

STOPS = ("rel", "abs", "never")
TINY = 1e-150  # keeps the Gram matrix of exact points invertible; in double, far below any entry that counts


class UnknownSetting(UserError, TypeError):
    """A keyword that the solver does not have."""


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Abstract. What every solver shares.

    max_iter  steps at most, >= 0; 0 returns the initial state without calling fn
    tol       a sample has converged when its residual is at most tol, > 0
    stop      rel: ||f(z) - z|| / ||f(z)||; abs: ||f(z) - z||, which grows with the dimension and with the scale of z;
              never: take all steps and return the last finite state; nothing is tested, so nothing synchronises
    """

    max_iter: int = 50
    tol: float = 1e-3
    stop: str = "rel"

    # True: the answer of a sample is fn's (damped) image of the point measured, a step closer where the map contracts,
    # and max_iter steps take max_iter evaluations. False: the point itself, and one evaluation more measures the last.
    returns_image = True

    def __new__(cls, *args, **settings):
        unknown = settings.keys() - {each.name for each in fields(cls)}
        if unknown:
            known, name = [each.name for each in fields(cls)], sorted(unknown)[0]
            raise UnknownSetting(
                f"{cls.__name__} has no setting {name!r}. {nearest(name, known)}Its settings are {', '.join(known)}."
            )
        return super().__new__(cls)

    def __post_init__(self):
        if self.max_iter < 0:
            raise UserError(f"solver.max_iter must be >= 0, got {self.max_iter}. Set it to the number of steps.")
        if not self.tol > 0:
            raise UserError(
                f"solver.tol must be > 0, got {self.tol}. For a fixed number of steps set solver.stop=never."
            )
        if self.stop not in STOPS:
            raise UserError(
                f"solver.stop must be one of {', '.join(STOPS)}, got {self.stop}. {nearest(self.stop, STOPS)}"
            )

    def init(self, z: Tensor) -> dict:
        """State before the first step from z (B, D)."""
        return {}

    @abstractmethod
    def step(self, problem, state: dict[str, Tensor], number: int, point) -> Tensor:
        """The next point (B, D) after evaluation `number` (from 1) at `point` (`common.deq.rows.Point`)."""

    def terminate(self, state: dict[str, Tensor], residual: Tensor) -> tuple[Tensor, Tensor]:
        """(converged, failed), (B,) bool each. Asked unless every residual is above tol and smaller than before."""
        return residual <= self.tol, ~torch.isfinite(residual)

    def lost(self, residual: Tensor, floor: Tensor) -> Tensor | None:
        """(B,) bool: samples that must go back to their best state; None for solvers that never send one back.

        residual  (B,) absolute, of this point: a relative one ends near 1 however far a sample has gone
        floor     (B,) the smallest before it, since the start or since the sample last went back: the state it starts
                  from again is not held against it, or it would go back there for ever
        """
        return None

    def finish(self, z: Tensor, fz: Tensor, gz: Tensor) -> Tensor:
        """The answer of a sample that ends with this measured point."""
        return fz if self.returns_image else z


def _check_tau(tau: float) -> None:
    if not 0 < tau <= 1:
        raise UserError(f"solver.tau must lie in (0, 1], got {tau}. 1 is undamped.")


@dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    """Damped fixed-point iteration z <- tau f(z) + (1 - tau) z. No history.

    Converges linearly where the eigenvalues of (1 - tau) I + tau J lie inside the unit circle. The residual is that of
    f, not of the damped map.
    """

    tau: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check_tau(self.tau)

    def step(self, problem, state, number, point):
        return self.finish(point.z, point.fz, point.gz)

    def finish(self, z, fz, gz):
        return fz if self.tau == 1 else torch.add(z, gz, alpha=self.tau)


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration, type II: the next point mixes m images so that the mixed residual is smallest.

        min_a ||sum_i a_i g_i||^2, sum_i a_i = 1;    z <- sum_i a_i (tau f(z_i) + (1 - tau) z_i)

    m          points remembered, >= 1; memory 2 m states
    tau        damping in (0, 1]
    ridge      share of itself added to each diagonal entry of the Gram matrix of the residuals, >= 0, so relative to
               its scale; None: the rounding unit of the state's type
    safeguard  > 1; a sample whose residual exceeds its smallest by this factor forgets all but its best and its newest
               point. inf, the default: never, since mixing leads back to the best points by itself. A sample whose
               residual is not finite always forgets everything and goes back to its best state; after RESTARTS of
               those the next one ends it

    Which point is replaced: one older than 3 m / 2 steps, else the one whose loss raises the mixed residual least. The
    three newest stay (the m - 1 newest for m below 4). Dropping the oldest, as is usual, takes twice the steps on
    symmetric maps; keeping a point for as long as its residual is small stalls on maps that are not normal.

    Plain steps: a mixture is as good as the smallest residual remembered, and no better where the residual must grow
    before it falls (maps that are not normal). A sample takes z <- tau f(z) + (1 - tau) z instead where its relative
    residual is STALLED and mixing promises no GAIN, and goes on doing so while its state grows or its residual falls.

    One step updates one row and column of the Gram matrix: B m D products, and B solves of size m in double precision.
    """

    m: int = 6
    tau: float = 1.0
    ridge: float | None = None
    safeguard: float = math.inf

    RECENT = 3  # newest points that are never forgotten; with fewer, a symmetric map loses its three-term recurrence
    RESTARTS = 3
    # The four numbers were chosen on the map families of `tools.bench deq`, see there. Relative residuals are meant.
    STALLED = (0.7, 2)  # the residual has not fallen to this share within that many steps
    GAIN = 0.4  # a mixed residual above this share of the smallest one remembered is no gain
    GROWS, FALLS = 1.1, 0.9  # factors per step: plain steps go on while ||f(z)|| rises or the residual falls by these
    FAR = (0.01, 0.1, 1.0)  # residuals: plain steps begin above the first, go on between the second and the third

    def __post_init__(self):
        super().__post_init__()
        _check_tau(self.tau)
        if self.m < 1:
            raise UserError(f"solver.m must be >= 1, got {self.m}. 6 is usual; 1 is plain iteration.")
        if self.ridge is not None and self.ridge < 0:
            raise UserError(f"solver.ridge must be >= 0 or null, got {self.ridge}. null is the rounding unit.")
        if not self.safeguard > 1:
            raise UserError(f"solver.safeguard must be > 1, got {self.safeguard}. inf, the default, switches it off.")

    def init(self, z):
        batch, width = z.shape
        integers = torch.zeros(batch, dtype=torch.int64, device=z.device)
        infinite = z.new_full((batch,), math.inf)
        return {
            "images": z.new_zeros(batch, self.m, width),
            "residuals": z.new_zeros(batch, self.m, width),
            "gram": torch.eye(self.m, dtype=torch.float64, device=z.device).expand(batch, -1, -1).clone(),
            "valid": None,  # (B, m) 0 or 1 once a sample has been cleared; None: every slot counts
            "born": torch.zeros(batch, self.m, dtype=torch.int64, device=z.device),  # step at which a slot was filled
            "slot": integers,  # where the next point goes
            "restarts": integers.clone(),  # because of a residual that was not finite
            "reached": infinite,  # relative residual against which progress is measured,
            "since": integers.clone(),  # and the steps since it was reached
            "plain": integers.bool(),  # the last step was a plain one,
            "size": infinite,  # ||f(z)|| and
            "relative": infinite,  # relative residual at that step
        }

    def step(self, problem, state, number, point):
        used = min(number, self.m)
        images, residuals = state["images"][:, :used], state["residuals"][:, :used]
        gram, born = state["gram"][:, :used, :used], state["born"][:, :used]
        valid = None if state["valid"] is None else state["valid"][:, :used]
        if number <= self.m:  # nothing to forget yet: the same slot for every sample
            at: tuple = (slice(None), number - 1)
            column: tuple = (slice(None), slice(None), number - 1)
        else:
            rows = torch.arange(len(born), device=born.device)
            at, column = (rows, state["slot"]), (rows, slice(None), state["slot"])
        images[at], residuals[at], born[at] = point.fz, point.gz, number
        products = dots(residuals, point.gz).double()
        if valid is not None:
            valid[at] = 1.0
            products = products * valid
        gram[at], gram[column] = products, products
        plain = self.finish(point.z, point.fz, point.gz)
        if used == 1:
            return plain if point.lost is None else self._go_back(state, number, point, plain)
        weights, cost, promised = self._weights(gram, valid, point.z.dtype)
        if number >= self.m:
            state["slot"] = self._forgotten(born, cost, number)
        squares = gram.diagonal(dim1=1, dim2=2)
        smallest = (squares if valid is None else squares.masked_fill(valid == 0, math.inf)).amin(1)
        without_gain = promised > self.GAIN**2 * smallest
        mixing = ~self._steps_plainly(state, point, without_gain)
        following = torch.where(mixing[:, None], self._mix(state, weights), plain)
        return following if point.lost is None else self._go_back(state, number, point, following)

    def _mix(self, state: dict, weights: Tensor) -> Tensor:
        """sum_i a_i (tau f(z_i) + (1 - tau) z_i) for weights a (B, n) -> (B, D)."""
        mixed = combine(weights, state["images"][:, : weights.shape[1]])
        if self.tau == 1:
            return mixed
        return mixed - (1 - self.tau) * combine(weights, state["residuals"][:, : weights.shape[1]])

    def _weights(self, gram: Tensor, valid: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Weights a (B, n), 0 for slots that do not count; cost of forgetting each (B, n); the mixed residual squared.

        With P the inverse of the Gram matrix G, a = P 1 / (1^T P 1) minimises a^T G a, and the minimum, the squared
        mixed residual, is 1 / (1^T P 1). Without entry j the minimum grows by a factor 1 / (1 - a_j^2 (1^T P 1) /
        P_jj), so a_j^2 / P_jj ranks the entries.
        """
        ridge = torch.finfo(dtype).eps if self.ridge is None else self.ridge
        gram = gram.clone()
        gram.diagonal(dim1=1, dim2=2).mul_(1 + ridge).add_(TINY)
        inverse = torch.linalg.inv_ex(gram)[0]
        # the sum rounds alike in both: that one sample was cleared must not show in the others
        raw = (inverse if valid is None else inverse * valid.unsqueeze(1)).sum(2)
        cost = raw * raw / inverse.diagonal(dim1=1, dim2=2)
        total = raw.sum(dim=1, keepdim=True)
        return (raw / total).to(dtype), cost, total.reciprocal().squeeze(1)

    def _forgotten(self, born: Tensor, cost: Tensor, number: int) -> Tensor:
        """(B,) slot whose point makes room for the next: the oldest if it is too old, else the one of least cost."""
        newest = born > number - min(self.RECENT, self.m - 1)
        age = number - born
        cost = torch.where(age >= 3 * self.m // 2, -age.double(), cost)  # a cost is never negative
        return cost.masked_fill(newest, math.inf).argmin(1)

    def _steps_plainly(self, state: dict, point, without_gain: Tensor) -> Tensor:
        """(B,) bool: samples whose next step is the plain one. Updates the record that this decision is based on."""
        share, steps = self.STALLED
        begin, low, high = self.FAR
        relative, size = point.relative, point.size
        fell = relative < share * state["reached"]
        state["reached"] = torch.where(fell, relative, state["reached"])
        state["since"] = torch.where(fell, 0, state["since"] + 1)
        begins = (state["since"] >= steps) & without_gain & (relative > begin)
        moving = (size > self.GROWS * state["size"]) | (relative < self.FALLS * state["relative"])
        goes_on = state["plain"] & moving & (relative > low) & (relative < high)
        state["plain"], state["size"], state["relative"] = begins | goes_on, size, relative
        return state["plain"]

    def _go_back(self, state: dict, number: int, point, following: Tensor) -> Tensor:
        """The next point (B, D) if some samples are lost: these forget all points but the best and the newest.

        If its newest point is not finite, a lost sample forgets all points and continues from its best state.
        """
        if state["valid"] is None:
            valid = torch.zeros_like(state["gram"][:, 0])
            valid[:, : min(number, self.m)] = 1.0
            state["valid"] = valid
        rows = torch.arange(len(following), device=following.device)
        finite = torch.isfinite(point.residual)
        squares = state["gram"].diagonal(dim1=1, dim2=2).masked_fill(state["valid"] == 0, math.inf)
        kept = torch.zeros_like(state["valid"], dtype=torch.bool)
        kept[rows, squares.argmin(1)] = True
        kept |= state["born"] == number
        kept = torch.where(point.lost[:, None], kept & finite[:, None], True)
        for name in ("images", "residuals", "valid"):  # a zero weight would not hide what is not finite
            state[name][~kept] = 0.0
        pairs = kept[:, :, None] & kept[:, None, :]
        state["gram"] = torch.where(pairs, state["gram"], torch.eye(self.m, dtype=torch.float64, device=rows.device))
        state["restarts"] += point.lost & ~finite
        state["reached"] = state["reached"].masked_fill(point.lost, math.inf)
        state["plain"] = state["plain"] & ~point.lost
        two = self._mix(state, self._weights(state["gram"], state["valid"], following.dtype)[0])
        again = torch.where((finite & (kept.sum(1) > 1))[:, None], two, point.best)
        return torch.where(point.lost[:, None], again, following)

    def lost(self, residual, floor):
        if math.isinf(self.safeguard):
            return ~torch.isfinite(residual)
        return ~(residual < self.safeguard * floor)

    def terminate(self, state, residual):
        return residual <= self.tol, ~torch.isfinite(residual) & (state["restarts"] >= self.RESTARTS)

    def finish(self, z, fz, gz):
        return fz if self.tau == 1 else torch.add(z, gz, alpha=self.tau)


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Good Broyden on g(z) = f(z) - z from the inverse Jacobian -I: one evaluation per step, superlinear.

    The inverse after the last l steps s_i with changes y_i of g has the closed form (Byrd, Nocedal, Schnabel 1994,
    restated for the inverse)

        H = -I + A M^-1 S^T,   A = S + Y,   M_ij = s_i . y_j  (i <= j),   s_i . (y_j + s_j)  (i > j)

    which stays a valid Broyden matrix when the oldest pair is forgotten. M^-1 is kept by bordering, in double.

    memory       pairs remembered, >= 1; None: max_iter of them (memory 2 x so many states)
    line_search  halve a sample's step, at most HALVINGS times, until its residual falls; each trial evaluates fn once
    safeguard    as in `Anderson`

    Three passes over the history per step: S.g, A.s and A^T w.
    """

    memory: int | None = None
    line_search: bool = False
    safeguard: float = 1e3

    returns_image = False
    RESTARTS = 3
    HALVINGS = 4

    def __post_init__(self):
        super().__post_init__()
        if self.memory is not None and self.memory < 1:
            raise UserError(f"solver.memory must be >= 1 or null, got {self.memory}. null keeps every step.")
        if not self.safeguard > 1:
            raise UserError(
                f"solver.safeguard must be > 1, got {self.safeguard}. 1000 is the default, inf switches it off."
            )

    @property
    def pairs(self) -> int:
        return max(min(self.memory or self.max_iter, self.max_iter), 1)

    def init(self, z):
        batch, width = z.shape
        return {
            "s": z.new_zeros(batch, self.pairs, width),
            "a": z.new_zeros(batch, self.pairs, width),
            # M^-1; rows and columns of empty or forgotten slots are zero, which takes their pairs out of every product
            "inverse": torch.zeros(batch, self.pairs, self.pairs, dtype=torch.float64, device=z.device),
            "sg": torch.zeros(batch, self.pairs, dtype=torch.float64, device=z.device),  # S . g of the last point
            "z": torch.zeros_like(z),
            "g": torch.zeros_like(z),
            "restarts": torch.zeros(batch, dtype=torch.int64, device=z.device),
            "extra": torch.zeros(batch, dtype=torch.int64, device=z.device),
        }

    def step(self, problem, state, number, point):
        update, lost = point.gz, point.lost
        used = min(number - 1, self.pairs)
        if used:
            self._remember(state, number - 2, used, point)
            inverse = state["inverse"][:, :used, :used]
            weights = dots(inverse, state["sg"][:, :used]).to(update.dtype)
            update = update - combine(weights, state["a"][:, :used])
        state["z"], state["g"] = point.z, point.gz
        moved = search(problem, state, point, update, self.HALVINGS) if self.line_search else point.z + update
        if lost is None:
            return moved
        # everything a lost sample remembers is cleared: a zero weight would not hide what is not finite
        state["restarts"] += lost
        for name in ("s", "a", "inverse", "sg"):
            state[name][lost] = 0.0
        # the way back to the best state must not become a pair: it is recorded as a step of length zero
        state["z"] = torch.where(lost[:, None], point.best, point.z)
        state["g"] = torch.where(lost[:, None], 0.0, point.gz)
        return torch.where(lost[:, None], point.best, moved)

    def lost(self, residual, floor):
        return ~(residual < self.safeguard * floor)

    def _remember(self, state: dict[str, Tensor], pair: int, used: int, point) -> None:
        """Put step number `pair`, which led to the point, into the history: in the oldest one's place when it is full.

        Let s be the step, y the change of g over it, a = s + y, and P = M^-1 of the pairs remembered before. Forgetting
        pair k removes its row and column from M. Of the inverse that leaves, by the Schur complement,

            P <- P - P_:k P_k: / P_kk                               (its row and column k become zero)

        The new pair adds the column c_i = s_i . y, the row r_j = s . (y_j + s_j) = a_j . s and the corner d = s . y:

            M' = [ M  c ]        P' = [ P + P c r P / t   -P c / t ]
                 [ r  d ]             [     -r P / t          1 / t ]        with t = d - r P c

        c needs no pass of its own over the history: s_i . y = s_i . g - s_i . g_before, and both are known. Where t is
        zero or not finite, 1 / t is replaced by 0: P stays, and the pair has a zero row and column, so no effect.

        A sample that has ended and waits for the others keeps its history: it forgets no pair and does not learn from
        the step that ended it. So Shine reads the same history as when the sample is solved alone.
        """
        slot, full = pair % self.pairs, pair >= self.pairs
        g = point.gz
        s, y = point.z - state["z"], g - state["g"]
        inverse = state["inverse"][:, :used, :used]
        before = None
        if full:
            before = (inverse.clone(), state["s"][:, slot].clone(), state["a"][:, slot].clone())
            pivot = inverse[:, slot, slot]
            over = torch.where(pivot == 0, 0.0, pivot.reciprocal())
            inverse -= inverse[:, :, slot, None] * (inverse[:, slot, None, :] * over[:, None, None])
            inverse[:, slot, :] = 0
            inverse[:, :, slot] = 0
        s_dot_g = dots(state["s"][:, :used], g).double()
        column = s_dot_g - state["sg"][:, :used]  # c; its entry at the slot itself meets a zero column of P
        row = dots(state["a"][:, :used], s).double()  # r, likewise
        right = dots(inverse, column)  # P c
        left = combine(row, inverse)  # r P
        complement = torch.linalg.vecdot(s, y).double() - torch.linalg.vecdot(row, right)  # t
        sound = complement.abs() > 1e-12 * torch.linalg.vecdot(s, s)  # false for what is not finite, too
        over = torch.where(sound & point.running, complement.reciprocal(), 0.0)[:, None]
        inverse += right.unsqueeze(2) * (left * over).unsqueeze(1)
        inverse[:, :, slot] = -right * over
        inverse[:, slot, :] = -left * over
        inverse[:, slot, slot] = over[:, 0]
        state["s"][:, slot] = s
        torch.add(s, y, out=state["a"][:, slot])
        s_dot_g[:, slot] = torch.linalg.vecdot(s, g)
        state["sg"][:, :used] = s_dot_g
        if before is not None:
            for new, old in zip((inverse, state["s"][:, slot], state["a"][:, slot]), before, strict=True):
                new.copy_(torch.where(point.running.view(-1, *[1] * (old.dim() - 1)), new, old))

    def terminate(self, state, residual):
        return residual <= self.tol, ~torch.isfinite(residual) & (state["restarts"] >= self.RESTARTS)

    @staticmethod
    def left_inverse(state: dict[str, Tensor], rows: Tensor) -> Tensor:
        """v (I - J)^-1 for row vectors v (B, D), as estimated by the last step: I - S M^-T A^T (SHINE, 2106.00553)."""
        weights = combine(dots(state["a"], rows).double(), state["inverse"])
        return rows - combine(weights.to(rows.dtype), state["s"])


@dataclass(frozen=True, kw_only=True)
class NewtonKrylov(Solver):
    """Newton's method on f(z) - z, each step solved by GMRES with Jacobian-vector products: the reference.

        (I - J(z)) d = f(z) - z;    z <- z + t d, t halved until the residual falls (at most HALVINGS times)

    Finds fixed points where f is not a contraction; converges quadratically near them. One step costs up to `krylov`
    products, each about two evaluations of f, counted as one evaluation. Memory: krylov + 1 states.

    krylov   largest Krylov space
    forcing  relative residual to which each linear system is solved, in (0, 1)
    fn must be differentiable in forward mode (torch.func.jvp).
    """

    krylov: int = 30
    forcing: float = 1e-2

    returns_image = False
    HALVINGS = 8

    def __post_init__(self):
        super().__post_init__()
        if self.krylov < 1:
            raise UserError(f"solver.krylov must be >= 1, got {self.krylov}. 30 is the default.")
        if not 0 < self.forcing < 1:
            raise UserError(f"solver.forcing must lie in (0, 1), got {self.forcing}. 0.01 is the default.")

    def init(self, z):
        return {"extra": torch.zeros(len(z), dtype=torch.int64, device=z.device)}

    def step(self, problem, state, number, point):
        width = point.z.shape[1]
        product = lambda v: v - problem.jvp(point.z, v)
        right = torch.where(point.running[:, None], point.gz, 0.0)
        direction, _, used = gmres(product, right, size=min(self.krylov, width), tol=self.forcing, fixed=problem.static)
        state["extra"] += used * point.running
        direction = torch.where(torch.isfinite(direction).all(dim=1, keepdim=True), direction, point.gz)
        return search(problem, state, point, direction, self.HALVINGS)


def search(problem, state: dict[str, Tensor], point, update: Tensor, halvings: int) -> Tensor:
    """z + t update per running sample, t in 1, 1/2, 1/4, ...: the first that lowers ||f(z) - z||, else the last.

    Trial evaluations are added to state["extra"]. The last one is kept in problem.known for the loop.
    """
    start = torch.linalg.vector_norm(point.gz, dim=1)
    length = torch.ones_like(start)
    z = torch.where(point.running[:, None], point.z + update, point.z)
    fz = problem(z)
    for _ in range(0 if problem.static else halvings):
        worse = ~(torch.linalg.vector_norm(fz - z, dim=1) < start) & point.running
        if not bool(worse.any()):
            break
        length = torch.where(worse, length / 2, length)
        z = torch.where(worse[:, None], point.z + length[:, None] * update, z)
        fz = problem(z)
        state["extra"] += worse
    problem.known = (z, fz)
    return z
