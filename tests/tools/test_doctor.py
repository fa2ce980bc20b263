import pytest
from packaging.specifiers import SpecifierSet

from tools import doctor
from tools.doctor import ABSENT, BROKEN, OK


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in ("DATA_ROOT", "ONESTEP_OUTPUTS", "ONESTEP_CACHE", "ONESTEP_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_whole_report_on_this_machine(clean, capsys):
    assert doctor.main(["--all"]) == 0
    out = capsys.readouterr().out
    assert "Error" not in out and "takes no" not in out, "a data set is looked at in a way it does not have"
    for word in (
        "python",
        "torch",
        "lightning",
        "CPU cores",
        "GPU",
        "digits",
        "cifar10",
        "outputs",
        "metric inception",
    ):
        assert word in out
    assert "tools.import_weights edm edm-cifar10-32x32-uncond-vp.pkl" in " ".join(out.split())
    assert "Everything for `make demo` is ready." in out
    assert list(clean.iterdir()) == [], "the doctor only looks"


@pytest.mark.parametrize("installed, state", [("2.6.4", OK), ("2.6.3", BROKEN), (None, BROKEN)])
def test_versions_are_compared_with_pyproject(monkeypatch, installed, state):
    def version(name):
        if installed is None:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert doctor._package("lightning", SpecifierSet(">=2.6.4")).state == state


def test_a_package_that_does_not_import(monkeypatch):
    monkeypatch.setitem(doctor.PACKAGES, "torch", ("no_such_module_here", True, ""))
    finding = doctor._package("torch", SpecifierSet(">=1"))
    assert finding.state == BROKEN and "does not import" in finding.what
    monkeypatch.setitem(doctor.PACKAGES, "wandb", ("no_such_module_here", False, "logger=wandb"))
    finding = doctor._package("wandb", SpecifierSet(">=0"))
    assert finding.state == ABSENT and "logger=wandb" in finding.what


def test_every_dependency_has_a_line(repo):
    findings = by_name(doctor.packages(repo / "pyproject.toml"))
    assert set(doctor.PACKAGES) <= set(findings)


def test_an_extra_says_how_to_install_it(repo, monkeypatch):
    monkeypatch.setitem(doctor.PACKAGES, "diffusers", ("no_such_module_here", False, "latents"))
    finding = by_name(doctor.packages(repo / "pyproject.toml"))["diffusers"]
    assert finding.state == ABSENT and finding.fix == "Run: pip install -e '.[latents]'"


def test_a_variant_of_a_data_set_is_looked_up_as_a_whole(clean):
    for name in ("imagenet512", "imagenet_latents256_standard"):
        finding = by_name(doctor.data_sets([name], str(clean)))[name]
        assert finding.state == ABSENT and "not found" in finding.fix
    assert doctor._read("data", "imagenet512", "data.source.resolution", clean) == 512


def test_data_found_missing_and_asked_for(clean, data_root, monkeypatch, capsys):
    assert doctor.main(["data=cifar10", f"data.root={data_root}"]) == 0
    assert f"found under {data_root}" in " ".join(capsys.readouterr().out.replace("\n", "").split())
    monkeypatch.setenv("DATA_ROOT", str(data_root))
    assert by_name(doctor.data_sets(["cifar10", "mnist"], None))["mnist"].state == OK
    assert doctor.main(["data=cifar10", f"data.root={clean}"]) == 1
    assert "Set data.root to the folder" in " ".join(capsys.readouterr().out.split())
    assert by_name(doctor.data_sets(["cifar10"], str(clean)))["cifar10"].state == ABSENT


@pytest.mark.parametrize("name", ["digits", "chains", "digit_canvas", "embedded_curve", "low_rank", "photograph"])
def test_sets_that_are_made_on_the_spot_need_nothing(clean, name):
    finding = by_name(doctor.data_sets([name], None))[name]
    assert finding.state == OK and finding.what == "needs no files"


def test_the_summary_comes_first_and_goes_on_as_it_looks(clean, monkeypatch, capsys):
    absent = [doctor.Finding(group="x", name=f"w{i}", state=ABSENT, what="no file", fix="Get it.") for i in range(9)]
    broken = doctor.Finding(group="machine", name="memory", state=BROKEN, what="1 GiB", fix="Buy some.", needed=True)
    seen = []
    for group in ("packages", "machine", "data_sets", "weights", "folders"):

        def look(*arguments, group=group):
            seen.append(capsys.readouterr().out)
            return {"weights": absent, "machine": [broken]}.get(group, [])

        monkeypatch.setattr(doctor, group, look)
    assert doctor.main([]) == 1
    seen.append(capsys.readouterr().out)
    assert "packages  0 of 0 ok" in seen[1] and "looking at machine" in seen[1], "each line when its group is done"
    text = "".join(seen)
    assert "weights   0 of 9 ok; absent: w0, w1, w2, w3, w4, w5 and 3 more" in text
    assert "Get it." not in text and "Buy some." in text


def test_without_anything_broken_the_summary_is_all(clean, monkeypatch, capsys):
    for group in ("packages", "machine", "data_sets", "weights", "folders"):
        found = doctor.Finding(group=group, name="a", state=ABSENT, what="no file", fix="Get it.")
        monkeypatch.setattr(doctor, group, lambda *arguments, found=found: [found])
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 12 and "5 optional things are absent." in out and "tools.doctor --all" in out


@pytest.mark.parametrize("word", ["data=cifar11", "dta=cifar10", "cifar10", "data="])
def test_unknown_words(clean, word, capsys):
    assert doctor.main([word]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    if word == "data=cifar11":
        assert "Closest: cifar10" in error


def test_output_folder_that_is_a_file(clean, monkeypatch):
    (clean / "taken").write_text("")
    monkeypatch.setenv("ONESTEP_OUTPUTS", str(clean / "taken" / "runs"))
    finding = by_name(doctor.folders())["outputs"]
    assert finding.state == BROKEN and "is a file" in finding.what and "ONESTEP_OUTPUTS" in finding.fix


def test_full_disk(clean, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    finding = by_name(doctor.folders())["outputs"]
    assert finding.state == BROKEN and "GiB free" in finding.what


def test_broken_means_exit_code_one(clean, monkeypatch, capsys):
    monkeypatch.setattr(
        doctor,
        "machine",
        lambda: [doctor.Finding(group="machine", name="memory", state=BROKEN, what="1 GiB", needed=True)],
    )
    monkeypatch.setattr(doctor, "packages", lambda: [])
    assert doctor.main([]) == 1
    assert "1 needed and broken: memory." in capsys.readouterr().out


def test_weights_that_are_there(clean, monkeypatch):
    monkeypatch.setenv("ONESTEP_WEIGHTS", str(clean))
    assert by_name(doctor.weights(None))["ect_cifar10"].state == ABSENT
    folder = clean / "edm-cifar10-32x32-uncond-vp"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    assert by_name(doctor.weights(None))["ect_cifar10"].state == OK
