"""DEQ-Flow: loss and gradient of every state, frozen statistics, real steps, pictures, clips and warm starts."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import nn

from common.deq.correction import Correction
from common.deq.grads import OneStep
from common.deq.layer import DEQ
from common.deq.solve import solve
from common.deq.solvers import Picard
from common.errors import UserError
from common.runtime.training.module import evaluating
from projects.deq_flow import video, warm
from projects.deq_flow.losses import flow_loss
from projects.deq_flow.module import DeqFlow
from projects.deq_flow.raft.network import FlowEquilibrium, grid
from projects.deq_flow.raft.upsample import convex_upsample
from projects.deq_flow.video import Follower, open_clips, steps_needed
from tools.claim import load_claim

REPO = Path(__file__).resolve().parents[2]
SIZES = dict(
    feature_channels=8, hidden_channels=6, corr_channels=[8, 6], flow_channels=[6, 4], motion_channels=6,
    head_channels=8, encoder_channels=[4, 4, 6], levels=2, radius=1,
)  # fmt: skip
OPTIONS = dict(
    crop=[32, 48], max_flow=400.0, freeze_norms=False, padding="sintel", reuse=True,
    optimizer=partial(torch.optim.AdamW, lr=1e-3), schedule=None,
)  # fmt: skip


def network(**options) -> FlowEquilibrium:
    torch.manual_seed(0)
    deq = DEQ(solver=Picard(max_iter=6, stop="never"), grad=OneStep(), states=3, sliced=True)
    return FlowEquilibrium(deq=options.pop("deq", deq), **{**SIZES, **options})


def module(net=None, correction=Correction(gamma=0.8), **options) -> DeqFlow:  # noqa: B008
    return DeqFlow(net=net or network(), correction=correction, **{**OPTIONS, **options})


def batch(count=2, height=32, width=48):
    torch.manual_seed(1)
    first, second = torch.rand(2, count, 3, height, width) * 2 - 1
    flow = torch.randn(count, 2, height, width) * 3
    return {"first": first, "second": second, "flow": flow, "valid": (torch.rand(count, height, width) > 0.2).float()}


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_loss_is_that_of_the_paper_written_out():
    """Two plain steps, one with gradient, three times; gamma^(2-i) on the loss of each, all pixels in the mean."""
    task, pairs = module(), batch()
    net = task.net.train()
    found = task.training_step(pairs, 0)
    found.backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    origin = grid(2, 4, 6)
    one, two = net.features(torch.cat([pairs["first"], pairs["second"]])).chunk(2)
    context = net.context(pairs["first"]).relu()
    args = (net.cell.gru.inject(context), net.cell.lookup.prepare(one, two), origin, ())
    z, loss = (torch.zeros_like(context), origin), 0.0
    for weight in (0.64, 0.8, 1.0):
        with torch.no_grad():
            for _ in range(2):
                z = net.cell(z, *args)
        h, c = net.cell(z, *args)
        z = (h.detach(), c.detach())
        error = (convex_upsample(c - origin, net.mask(h)) - pairs["flow"]).abs() * pairs["valid"][:, None]
        loss = loss + weight * error.sum() / error.numel()
    loss.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    for name, p in net.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-6)


def test_six_equal_states_count_3_689_times(monkeypatch):
    task, pairs = module(), batch()
    single = flow_loss(torch.zeros_like(pairs["flow"]), pairs["flow"], pairs["valid"])
    task.outputs(pairs)  # the layer has a record
    monkeypatch.setattr(task, "outputs", lambda pairs: [torch.zeros_like(pairs["flow"])] * 6)
    assert float(task.training_step(pairs, 0) / single) == pytest.approx(3.68928)


def test_fast_pixels_do_not_count():
    task, pairs = module(max_flow=5.0), batch()
    output = torch.zeros_like(pairs["flow"])
    slow = torch.linalg.vector_norm(pairs["flow"], dim=1) < 5
    assert not slow.all()
    wanted = (pairs["flow"].abs() * (slow & (pairs["valid"] > 0))[:, None]).mean()
    torch.testing.assert_close(task.criterion(output, pairs), wanted)


def test_frozen_statistics_stay_frozen_through_evaluations():
    for frozen in (True, False):
        task, pairs = module(freeze_norms=frozen), batch()
        task.train()
        with evaluating(task):
            task.evaluation_step(pairs)
        task.train()
        norms = [part for part in task.net.modules() if isinstance(part, nn.BatchNorm2d)]
        before = [norm.running_mean.clone() for norm in norms]
        task.training_step(pairs, 0)
        assert norms and all(norm.training is not frozen for norm in norms)
        assert all(torch.equal(a, norm.running_mean) is frozen for a, norm in zip(before, norms))


TINY = [
    "data.train.chairs.weight=0",
    *(f"data.evaluation.pairs_{name}=null" for name in ("chairs", "middlebury", "sintel", "kitti")),
    "data.batch_size=2", "data.crop=[64,64]", "project.net.encoder_channels=[8,8,8]",
    "project.net.deq.solver.max_iter=6", "data.train.synthflow.source.held_out_pairs=2", "evaluate=split",
    "evaluate.split=[held_out]", "evaluate.curve_split=null", "evaluate.average=raw",
]  # fmt: skip


@pytest.mark.parametrize("name", ["deq_flow_tiny", "deq_flow_tiny_unroll"])
def test_real_steps(name, two_steps, tmp_path):
    words = [*TINY, *(["project.net.deq.states=6"] if "unroll" in name else [])]
    before, after, rows = two_steps(name, tmp_path / "run", *words)
    assert len(rows) == 2 and all(float(row["train/loss"]) > 0 for row in rows)
    moved = [key for key, value in before.items() if not torch.equal(value, after[key])]
    for part in ("features.", "context.", "cell.gru.", "cell.head.", "mask."):
        assert any(key.startswith(part) for key in moved), part


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_any_size_is_padded_and_cut_back():
    task, pairs = module().eval(), batch(1, 37, 50)
    with torch.no_grad():
        flow = task.estimate(pairs["first"], pairs["second"])
        found = task.evaluation_step(pairs)
    assert flow.shape == (1, 2, 37, 50)
    known = pairs["valid"] > 0.5
    error = torch.linalg.vector_norm(flow - pairs["flow"], dim=1)[known]
    motion = torch.linalg.vector_norm(pairs["flow"], dim=1)[known]
    mean = {name: float(total / count) for name, (total, count) in found.items()}
    assert mean["epe"] == pytest.approx(float(error.mean()), rel=1e-5)
    assert mean["3px"] == pytest.approx(100 * float((error < 3).float().mean()), rel=1e-5)
    assert mean["motion"] == pytest.approx(float(motion.mean()), rel=1e-5)


PAN = {"photograph": "coffee", "size": [16, 24], "step": [1, 1], "frames": 3}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: module(crop=[30, 48]), r"project.crop must be \[height, width\], multiples of 8, got \[30, 48\]"),
        (lambda: module(max_flow=0.0), "project.max_flow must be > 0 pixels"),
        (lambda: module(padding="chairs"), "project.padding must be sintel or kitti, got 'chairs'"),
        (lambda: module(reuse="always"), "project.reuse must be true, false or interpolate, got 'always'"),
        (lambda: warm.Sequences(pans={}, folders={}), "must name at least one sequence"),
        (lambda: warm.Sequences(pans={"pan": PAN}, folders={}).train_dataloader(), "Use task=test"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(UserError, match=message):
        make()


class PairSet:
    """Three pairs of an evaluation set."""

    splits = ("synth", "real")

    def pairs(self, split):
        return self

    def padding(self, split):
        return None

    def __len__(self):
        return 3

    def read(self, index):
        torch.manual_seed(index)
        image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
        return {"first": image, "second": image, "flow": torch.randn(2, 40, 60), "valid": torch.ones(40, 60)}


def test_show_draws_a_sheet_for_every_set(tmp_path):
    task = module()
    with evaluating(task):
        written = task.show(PairSet(), tmp_path, samples=2, seed=0)
        preview = task.preview(PairSet(), tmp_path / "step-1", samples=64, seed=0)
    assert [path.name for path in (*written, *preview)] == ["synth.png", "real.png", "step-1.png"]
    sheets = [Image.open(path) for path in (*written, *preview)]
    assert sheets[0].width > 4 * 320 and sheets[2].height > 1.3 * sheets[0].height


def test_an_evaluation_set_says_how_it_is_padded():
    """KITTI is padded on both sides and below, whatever the stage; sides that fit make no difference."""
    task, pairs = module(padding="sintel").eval(), batch(1, 37, 50)
    with torch.no_grad():
        for padding in ("sintel", "kitti", None):
            found = task.evaluation_step({**pairs, **({"padding": padding} if padding else {})})["epe"][0]
            own = module(padding=padding or "sintel").eval()
            assert torch.equal(found, own.evaluation_step(pairs)["epe"][0])
        sums = {
            padding: task.evaluation_step({**pairs, "padding": padding})["epe"][0] for padding in ("sintel", "kitti")
        }
    assert sums["sintel"] != sums["kitti"]


def test_published_settings_are_the_authors():
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        composed = {
            name: compose("config", [f"+experiment=deq_flow_{name}"])
            for name in ("things_h", "things_h_3x", "v1_things_h", "v1_chairs_h", "sintel_h", "kitti_h", "things_b")
        }
    for name, cfg in composed.items():
        sets = cfg.data.get("evaluation", {})
        assert all((part.get("padding") == "kitti") == (key == "kitti") for key, part in sets.items()), name
        deq, v1 = cfg.project.net.deq, name.startswith("v1") or name in ("sintel_h", "kitti_h")
        assert deq.sliced == ("solver" if v1 else True)
        assert deq.eval_factor == (3.0 if name == "things_h_3x" else 1.5)
        assert (deq.solver.max_iter, deq.states) == ((36, 6) if v1 else (40, 2)), name


# ---------------------------------------------------------------------------------------------------------------------
# Clips and warm starts


class Contraction(nn.Module):
    """A network whose equilibrium moves with the brightness of its images: c* = origin + mean(second) everywhere."""

    def __init__(self, tol=1e-4):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.deq = DEQ(solver=Picard(max_iter=80, tol=tol), grad=OneStep())
        self.cell, self.state, self.least = self.step, None, 8

    def freeze_batch_norm(self, frozen=True):
        pass

    @staticmethod
    def step(z, goal, origin):
        h, c = z
        return h.lerp(goal, 0.3), c.lerp(origin + goal, 0.3)

    def outputs(self, first, second, start=None):
        origin = grid(len(first), first.shape[2] // 8, first.shape[3] // 8)
        goal = 20 * second.mean((1, 2, 3)).view(-1, 1, 1, 1) + torch.zeros_like(origin)
        z = (torch.zeros_like(origin), origin) if start is None else start
        self.state = self.deq(self.step, z, (goal, origin))[-1]
        return [torch.nn.functional.interpolate(self.state[1] - origin, scale_factor=8)]

    def carried(self):
        return self.state


def clip(count=5, height=24, width=33):
    """Frames that grow a little brighter."""
    return torch.stack([torch.full((3, height, width), 30 + 4 * n, dtype=torch.uint8) for n in range(count)])


def test_steps_needed_counts_to_the_tolerance_even_when_the_solve_goes_on():
    slow = lambda z: 0.9 * z + 1
    run = lambda stop: solve(slow, torch.zeros(1, 4), solver=Picard(max_iter=80, tol=1e-3, stop=stop))
    early, late = run("rel"), run("never")
    assert steps_needed(late, 1e-3)[0] == steps_needed(early, 1e-3)[0] == int(early.evaluations) < 80
    assert steps_needed(late, 1e-30)[0] == int(late.evaluations)
    assert steps_needed(late, 1e-3)[1] < steps_needed(early, 1e-3)[1] <= 1e-3


def test_a_pan_needs_fewer_evaluations_from_the_last_equilibrium():
    task = module(Contraction()).eval()
    frames = clip(5, 24, 40)[:, None].float() / 127.5 - 1
    counts = {}
    with torch.no_grad():
        for reuse in (False, True):
            follow = Follower(task, reuse)
            counts[reuse] = [follow(a, b)[1:] for a, b in pairwise(frames)]
    assert counts[True][0] == counts[False][0], "the first pair starts from zero in either way"
    assert all(warm[0] < cold[0] - 3 for warm, cold in zip(counts[True][1:], counts[False][1:]))
    assert all(residual <= 1e-4 for column in counts.values() for _, residual in column)


@pytest.mark.parametrize("film", [False, True])
def test_show_files_writes_colours_film_and_iterations(film, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "clip"
    folder.mkdir()
    for number, frame in enumerate(clip()):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / f"frame_{number + 8}.png")
    writer = (lambda path, frames, rate: Path(path)) if film else (lambda path, frames, rate: None)
    monkeypatch.setattr(video, "write_film", writer)
    task = module(Contraction(), reuse="interpolate")
    with evaluating(task):
        written = task.show_files(folder, None, tmp_path / "out")
    names = [path.relative_to(tmp_path / "out").as_posix() for path in written]
    films = ["flow.mp4"] if film else []
    assert names == [
        "flow.gif",
        *films,
        "iterations.png",
        "iterations.json",
        *(f"frames/{n:06d}.png" for n in range(4)),
    ]
    assert Image.open(written[0]).n_frames == 4 and Image.open(written[-1]).size == (33, 24)
    found = json.loads((tmp_path / "out/iterations.json").read_text())
    assert found["mean_steps"]["reuse, interpolated"] < found["mean_steps"]["from zero"]
    assert found["tolerance"] == 1e-4 and len(found["pairs"]) == 4 and found["pairs"][3]["difference_px"] < 0.1
    assert ("No flow.mp4" in capsys.readouterr().out) is not film


@pytest.mark.parametrize("as_list", [False, True])
def test_two_pictures_of_ones_own_smaller_than_the_network_takes(as_list, tmp_path):
    """Padded and cut back: the answer has the pictures' size. `first` and `second` have no numbers to go by."""
    files = [tmp_path / "mine" / name for name in ("first.png", "second.png")]
    files[0].parent.mkdir()
    for file, frame in zip(files, clip(2), strict=True):
        Image.fromarray(frame[:, :10, :21].permute(1, 2, 0).numpy()).save(file)
    task = module(network(), reuse=False)
    assert task.net.least > 10
    with evaluating(task):
        written = task.show_files(files if as_list else files[0].parent, None, tmp_path / "out")
    assert [path.name for path in written[-1:]] == ["000000.png"] and Image.open(written[-1]).size == (21, 10)


def test_animations_are_clips_and_bad_input_is_one_sentence(tmp_path, monkeypatch):
    frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (found,) = open_clips(tmp_path / "a.gif")
    assert [tuple(frame.shape) for frame in found] == [(3, 24, 33)] * 3 and found.name == "a"
    frames[0].save(tmp_path / "one.png")
    with pytest.raises(UserError, match="one has one frame, flow needs two"):
        list(open_clips(tmp_path / "one.png")[0])
    (tmp_path / "film.mp4").write_bytes(b"no film")
    with pytest.raises(UserError, match=r"film.mp4 (is a film, and there is nothing here|cannot be read as a film)"):
        open_clips(tmp_path / "film.mp4")
    (tmp_path / "notes.md").write_text("no clip")
    with pytest.raises(UserError, match=r"sample.input=.*notes.md is no clip"):
        open_clips(tmp_path / "notes.md")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        open_clips(tmp_path / "film.mp4")
    assert video.write_film(tmp_path / "x.mp4", list(clip()), 10) is None


def test_a_film_comes_back(tmp_path):
    pytest.importorskip("av")
    path = video.write_film(tmp_path / "x.mp4", list(clip(6, 64, 81)), 12.5)
    (found,) = open_clips(path)
    frames = torch.stack(list(found))
    assert frames.shape == (6, 3, 64, 80) and found.rate == 12.5
    assert (frames.float() - clip(6, 64, 80).float()).abs().mean() < 4


def test_pans_move_by_the_step_and_stay_in_the_photograph():
    frames = warm.pan("astronaut", [40, 48], [3, -2], 4)
    assert len(frames) == 4 and frames[0].shape == (3, 40, 48)
    assert torch.equal(frames[1][:, 2:, :-3], frames[0][:, :-2, 3:])
    with pytest.raises(UserError, match=r"a pan of 100 frames by \[9, 0\] pixels over astronaut \(512x512\)"):
        warm.pan("astronaut", [40, 48], [9, 0], 100)


def test_sequences_are_splits(tmp_path):
    for number, frame in enumerate(clip()):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / f"hall_{number}.png")
    folders = {"hall": {"path": str(tmp_path), "sequence": "hall", "size": [16, 24]}}
    data = warm.Sequences(pans={"pan": PAN}, folders=folders)
    data.check()
    assert data.splits == ("pan", "hall")
    task = warm.WarmStart(net=Contraction(), correction=None, **OPTIONS).eval()
    (found,) = data.eval_batches("hall")
    assert found["frames"].shape == (1, 5, 3, 16, 24) and found["frames"].abs().max() <= 1
    with torch.no_grad():
        sums = task.evaluation_step(found)
    assert sums["reuse_steps"][0] < sums["zero_steps"][0] and sums["zero_difference"] == (0.0, 3)
    with pytest.raises(UserError, match="gives 5 frame\\(s\\) of hall, 24x33"):
        warm.folder(str(tmp_path), "hall", [64, 64])
    with pytest.raises(UserError, match=r"data.folders.hall.path: .*gone is no folder"):
        warm.Sequences(pans={}, folders={"hall": {**folders["hall"], "path": str(tmp_path / "gone")}}).check()


# ---------------------------------------------------------------------------------------------------------------------
# Cost


def test_the_claim_is_well_formed():
    claim = load_claim("deq_flow")
    assert len(claim["seeds"]) == 3 and len(claim["relations"]) >= 8
