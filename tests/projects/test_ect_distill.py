"""ECD, the distillation ablation: the ODE teacher is the initial network, for the whole run and across a restart."""

import torch

from common.runtime.verbs.fit import fit_task

STEPS = ("project.distill=true", "callbacks.checkpoints.every_n_steps=2", "data.batch_size=32")


def weights(folder, step):
    return torch.load(folder / f"checkpoints/step-{step:08d}.ckpt", weights_only=True)["state_dict"]


def test_the_teacher_keeps_the_initial_weights_across_a_restart(composed, tmp_path):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    fit_task(composed("ect_tiny", straight, *STEPS, "trainer.max_steps=4"))
    fit_task(composed("ect_tiny", parts, *STEPS, "trainer.max_steps=2"))
    first = weights(parts, 2)
    fit_task(composed("ect_tiny", parts, *STEPS, "trainer.max_steps=4"))
    one, two = weights(straight, 4), weights(parts, 4)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    teacher = [k for k in one if k.startswith("ode_teacher.") and k.endswith("weight")]
    assert teacher and all(torch.equal(first[k], two[k]) for k in teacher)
    moved = [k for k in teacher if not torch.equal(two[k], two[k.replace("ode_teacher.", "net.")])]
    assert moved, "the student moves away from its teacher"


def test_distillation_changes_the_pair(composed, tmp_path):
    """The trained weights differ from those of tuning with the same draws."""
    fit_task(composed("ect_tiny", tmp_path / "ecd", *STEPS))
    fit_task(composed("ect_tiny", tmp_path / "ect", *STEPS, "project.distill=false"))
    one, two = weights(tmp_path / "ecd", 2), weights(tmp_path / "ect", 2)
    assert not torch.equal(one["net.model.layer_in.weight"], two["net.model.layer_in.weight"])
