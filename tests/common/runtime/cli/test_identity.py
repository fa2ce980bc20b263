"""What identifies a run: one function behind its name and behind the refusal to continue another run."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.runtime.cli.identity import first_difference, identifies, override_key, run_name
from common.runtime.cli.launch import register_resolvers

CONF = Path(__file__).resolve().parents[4] / "conf"
SAME_WEIGHTS = [
    "task=test", "resume=never", "run.dir=/x", "sample.samples=3", "sampler@sample.sampler=heun", "evaluate=none",
    "evaluate.samples=5", "logger=wandb", "callbacks.progress=null", "trainer.max_steps=9", "trainer=gpu",
    "trainer.devices=4", "data.root=/x", "data.num_workers=3", "+debug=fast", "+experiment=x", "paths.outputs=/x",
    "+guidance=omegas", "+sampler@evaluate.samplers.four=meanflow", "data.eval_batch_size=3", "data.val_split=null",
    "hydra/launcher=joblib", "speed.threads=1", "data.source.cache_dir=/x", "seed=4",
]  # fmt: skip
OTHER_WEIGHTS = [
    "project.optimizer.lr=1", "data.batch_size=3", "ema.profiles.ema.decay=0.5", "net@project.net=ect_mlp",
    "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1", "+project.x=1", "~ema.profiles.ema.decay",
    "init.file=x", "data=digits", "data.train.chairs.weight=2", "data.augment.flip=0", "data.train_split=val",
    "data.class_weighting=inverse_log", "callbacks.seeding=null", "+trainer.limit_train_batches=1",
]  # fmt: skip


@pytest.mark.parametrize("word", SAME_WEIGHTS)
def test_what_does_not_change_the_weights_does_not_change_the_name(word):
    assert run_name(4, [word]) == "seed4"


@pytest.mark.parametrize("word", OTHER_WEIGHTS)
def test_what_changes_the_weights_changes_the_name(word):
    assert run_name(4, [word]) != "seed4"


def test_names_of_older_versions_stay():
    words = ["project.optimizer.lr=0.001", "+experiment=edm_tiny", "data.batch_size=32", "task=sample"]
    assert run_name(3, words) == "seed3-26a2fc"  # as commit a39c4bd named it


@pytest.mark.parametrize(("text", "key"), [
    ("+sampler@sample.sampler=heun", "sample.sampler"), ("~ema.profiles.ema", "ema.profiles.ema"),
    ("hydra/launcher=joblib", "hydra.launcher"), ("a.b=c=d@e", "a.b"), ("/net@project.net=x", "project.net"),
])  # fmt: skip
def test_the_key_of_an_override(text, key):
    assert override_key(text) == key


@pytest.mark.parametrize(("experiment", "word", "counts"), [
    ("edm_tiny", "trainer.max_steps=3", False),  # a constant learning rate
    ("ect_tiny_random", "trainer.max_steps=3", True),  # its schedule ends with the run
    ("deq_flow_tiny", "data.root=/x", False),  # files below the folder, wherever that is
])  # fmt: skip
def test_a_setting_others_are_computed_from_identifies_with_them(experiment, word, counts):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = compose("config", [f"+experiment={experiment}", word])
    name = run_name(0, [word], OmegaConf.to_container(tree, resolve=False))
    assert (name != "seed0") == counts


def test_two_folders_of_pictures_are_two_runs():
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = OmegaConf.to_container(compose("config", ["+experiment=edm_tiny", "data=folder"]), resolve=False)
    names = {run_name(0, ["data=folder", f"data.root={root}"], tree) for root in ("/a", "/b")}
    assert len(names) == 2


@pytest.mark.parametrize(("key", "value", "differs"), [
    ("project.optimizer.lr", 1, True), ("seed", 1, True), ("data.train.chairs.weight", 2, True),
    ("data.augment.flip", 0.0, True), ("data.class_weighting", "inverse_log", True), ("data.train_split", "val", True),
    ("ema.every", 2, True), ("trainer.precision", "bf16-mixed", True), ("ema.profiles.other.decay", 0.5, True),
    ("data.eval_batch_size", 7, False), ("data.root", "/elsewhere", False), ("trainer.max_steps", 9, False),
    ("evaluate.samples", 9, False), ("project.file", "/elsewhere/vgg.pt", False), ("project.file", "/a/other.pt", True),
])  # fmt: skip
def test_name_and_refusal_agree(key, value, differs):
    before = OmegaConf.create({
        "seed": 0, "project": {"optimizer": {"lr": 2}, "file": "/a/vgg.pt"}, "evaluate": {"samples": 1},
        "data": {"root": "/a", "train": {"chairs": {"weight": 1}}, "augment": {"flip": 0.5}, "train_split": "train",
                 "class_weighting": "none", "eval_batch_size": 1},
        "ema": {"every": 1, "profiles": {}}, "trainer": {"max_steps": 1, "precision": "32-true"},
    })  # fmt: skip
    after = before.copy()
    OmegaConf.update(after, key, value)
    found = first_difference(OmegaConf.to_container(before), OmegaConf.to_container(after))
    assert (found is not None) == differs
    if differs:
        assert found[0] == key and found[2] == value
    if "/" not in str(value):  # a file below another folder: the name cannot know, the comparison does
        assert identifies(key) == differs


def test_an_option_an_older_version_lacked_has_its_default():
    new = {"ema": {"_target_": "common.runtime.training.ema.WeightAverages", "profiles": {}, "every": 1}}
    old = {"ema": {"_target_": "common.runtime.ema.WeightAverages", "profiles": {}}}  # before the class moved
    assert first_difference(old, new) is None
    new["ema"]["every"] = 2
    assert first_difference(old, new) == ("ema.every", 1, 2)
