"""What will work on this machine, and why not: `python -m tools.doctor [--all] [data=<name>] [data.root=<folder>]`.

Looks at packages, the machine, data sets, weights and folders: one line per group as it goes, then what is broken.
--all lists every finding with what to do about it. Leaves no files and downloads nothing.
Exit code 1 when something `make demo` needs is broken, or when the data set asked for is not usable; else 0.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError, nearest

ROOT = Path(__file__).resolve().parent.parent
OK, ABSENT, BROKEN = "ok", "absent", "BROKEN"
SHOWN = 6  # names in a line of the summary
NOWHERE = Path("/nonexistent")

# distribution -> (module to import, needed by `make demo`, what works only with it)
PACKAGES = {
    "torch": ("torch", True, ""),
    "torchvision": ("torchvision", True, ""),
    "timm": ("timm", False, "timm feature extractors"),
    "lightning": ("lightning.pytorch", True, ""),
    "torchmetrics": ("torchmetrics", True, ""),
    "hydra-core": ("hydra", True, ""),
    "omegaconf": ("omegaconf", True, ""),
    "torch-fidelity": ("torch_fidelity", False, "FID with the 2015 Inception network"),
    "safetensors": ("safetensors", True, ""),
    "scikit-learn": ("sklearn.datasets", True, ""),
    "scikit-image": ("skimage", False, "image metrics"),
    "scipy": ("scipy.linalg", True, ""),
    "numpy": ("numpy", True, ""),
    "matplotlib": ("matplotlib", True, ""),
    "pillow": ("PIL.Image", True, ""),
    "rich": ("rich", True, ""),
    "hydra-joblib-launcher": ("hydra_plugins.hydra_joblib_launcher", False, "-m hydra/launcher=parallel"),
    "hydra-submitit-launcher": ("hydra_plugins.hydra_submitit_launcher", False, "-m hydra/launcher=submit_local"),
    "hydra-optuna-sweeper": ("hydra_plugins.hydra_optuna_sweeper", False, "-m hydra/sweeper=search"),
    "wandb": ("wandb", False, "logger=wandb"),
    "tensorboard": ("tensorboard", False, "logger=tensorboard"),
    "diffusers": ("diffusers", False, "tools.encode_latents and decoder=sd_vae"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table. needed: `make demo`, or the data set asked for, depends on it."""

    group: str
    name: str
    state: str
    what: str
    fix: str = ""
    needed: bool = False


def packages(project: Path = ROOT / "pyproject.toml") -> Iterable[Finding]:
    """Python and every dependency of pyproject.toml: installed, new enough, and really importable."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    have, want = platform.python_version(), declared["requires-python"]
    good = SpecifierSet(want).contains(have, prereleases=True)
    yield Finding(
        group="packages", name="python", state=OK if good else BROKEN, what=f"{have} (needs {want})", needed=True,
        fix="" if good else "Install a newer Python and run: make install",
    )  # fmt: skip
    for line in declared["dependencies"]:
        requirement = Requirement(line)
        yield _package(requirement.name, requirement.specifier)
    for extra, lines in declared.get("optional-dependencies", {}).items():
        for requirement in map(Requirement, lines):
            if requirement.name in PACKAGES:  # not the tools of developers
                finding = _package(requirement.name, requirement.specifier)
                yield replace(finding, fix=finding.fix and f"Run: pip install -e '.[{extra}]'")


def _package(name: str, specifier) -> Finding:
    module, needed, only = PACKAGES.get(name, (None, True, ""))
    absent = BROKEN if needed else ABSENT
    note = f"; used by {only}" if only else ""
    finding: dict[str, Any] = dict(group="packages", name=name, needed=needed, fix="Run: make install")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(**finding, state=absent, what=f"not installed (needs {specifier or 'any version'}){note}")
    if not specifier.contains(version, prereleases=True):
        return Finding(**finding, state=absent, what=f"{version}, but {specifier} is needed{note}")
    if module is not None:
        try:
            importlib.import_module(module)
        except Exception as error:  # a half-installed package can fail with anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return Finding(**finding, state=absent, what=f"{version} does not import: {reason}{note}")
    return Finding(group="packages", name=name, needed=needed, state=OK, what=version)


def machine() -> Iterable[Finding]:
    """Cores, memory, accelerators, git."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(group="machine", name="CPU cores", state=OK, what=str(cores))
    memory = _memory_gib()
    if memory is not None:
        small = memory < 2
        yield Finding(
            group="machine", name="memory", state=BROKEN if small else OK, what=f"{memory:.1f} GiB", needed=True,
            fix="The demo needs 2 GiB: use a larger machine." if small else "",
        )  # fmt: skip
    yield _accelerator()
    git = shutil.which("git")
    yield Finding(
        group="machine", name="git", state=OK if git else ABSENT, what="found" if git else "not found",
        fix="" if git else "Install git: without it runs and claims cannot record their commit.",
    )  # fmt: skip
    slurm = shutil.which("sbatch")
    yield Finding(
        group="machine", name="Slurm", state=OK if slurm else ABSENT, what="found" if slurm else "no sbatch here",
        fix="" if slurm else "Only needed for hydra/launcher=submit_slurm and trainer=slurm.",
    )  # fmt: skip


def _memory_gib() -> float | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # what a container may really use
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total / 2**30


def _accelerator() -> Finding:
    try:
        import torch

        if torch.cuda.is_available():
            names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            what = ", ".join(f"{p.name} {p.total_memory / 2**30:.0f} GiB" for p in names)
            return Finding(group="machine", name="GPU", state=OK, what=what)
        if torch.backends.mps.is_available():
            return Finding(group="machine", name="GPU", state=OK, what="Apple MPS")
    except Exception as error:  # a broken driver must not end the report
        return Finding(group="machine", name="GPU", state=ABSENT, what=str(error).splitlines()[0])
    return Finding(
        group="machine", name="GPU", state=ABSENT, what="none that torch can use",
        fix="The *_tiny experiments run without; published ones take weeks on a CPU.",
    )  # fmt: skip


def data_root(given: str | None = None) -> tuple[Path, str]:
    """(folder with the data sets, where that answer comes from): data.root=, DATA_ROOT, .cache/data."""
    if given:
        return Path(given), "data.root"
    if os.environ.get("DATA_ROOT"):
        return Path(os.environ["DATA_ROOT"]), "DATA_ROOT"
    return Path(".cache/data"), "default"


def data_names(conf: Path = ROOT / "conf") -> list[str]:
    return sorted(path.stem for path in (conf / "data").glob("*.yaml"))


def data_sets(names: Iterable[str], root: str | None, asked: str | None = None) -> Iterable[Finding]:
    """Every data set of conf/data: are its files where the configuration will look."""
    folder, origin = data_root(root)
    beside = ROOT.parent / "shared" / "data"
    for name in names:
        needed = name in ("digits", asked)
        try:
            _check_data(name, folder)
        except Exception as error:
            fix = str(error).splitlines()[0] if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if origin == "default" and beside.is_dir() and _works(_check_data, name, beside):
                fix = f"Found in {os.path.relpath(beside)}: set DATA_ROOT or data.root to that folder."
            yield Finding(
                group="data", name=name, state=BROKEN if needed else ABSENT, what=f"not usable under {folder}", fix=fix,
                needed=needed,
            )  # fmt: skip
        else:
            where = "needs no files" if _works(_check_data, name, NOWHERE) else f"found under {folder}"
            yield Finding(group="data", name=name, state=OK, what=where, needed=needed)


def _works(function: Callable, *args) -> bool:
    try:
        function(*args)
    except Exception:
        return False
    return True


def _read(part: str, name: str, key: str, folder: Path):
    """Value of `key` in conf/<part>/<name>.yaml as plain data, with the data folder filled in; None when not there."""
    from omegaconf import OmegaConf

    top: Any = OmegaConf.load(ROOT / "conf" / "config.yaml")
    chosen = _with_parents(part, name)
    tree: Any = OmegaConf.create({"paths": top.paths, "seed": 0})
    if part != "data":
        tree = OmegaConf.merge(tree, {"data": {"root": str(folder)}})
    # experiments are merged at the top of the tree, other groups under their own name
    tree = OmegaConf.merge(tree, chosen if part == "experiment" else {part: chosen}, {"paths": {"data": str(folder)}})
    value = OmegaConf.select(tree, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _with_parents(part: str, name: str):
    """conf/<part>/<name>.yaml over the choices of its group that it is a variant of."""
    from omegaconf import OmegaConf

    chosen: Any = OmegaConf.load(ROOT / "conf" / part / f"{name}.yaml")
    for parent in chosen.get("defaults", []):
        if isinstance(parent, str) and (ROOT / "conf" / part / f"{parent}.yaml").is_file():
            chosen = OmegaConf.merge(_with_parents(part, parent), chosen)
    chosen.pop("defaults", None)
    return chosen


def _check_data(name: str, folder: Path) -> None:
    """Raises what a run with data=<name> would when it looks for its files under `folder`."""
    from common.weights.build import build

    data = build(_read("data", name, "data", folder))
    data.check()
    if name == "digits":
        data.source.load("test")


def weights(root: str | None) -> Iterable[Finding]:
    """Weights experiments start from, and weights the metrics need."""
    from omegaconf import OmegaConf

    from common.weights.official import RELEASES

    folder, _ = data_root(root)
    releases = {experiment: release for release in RELEASES.values() for experiment in release.used_by}
    seen = set()
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        given = _with_parents("experiment", path.stem)
        if "${needs." in str(OmegaConf.to_container(given, resolve=False).get("init", {}).get("file")):
            continue  # the run trains it itself
        file = _read("experiment", path.stem, "init.file", folder)
        if not file or file in seen:
            continue
        seen.add(file)
        release = releases.get(path.stem)
        there = Path(file).is_file()
        fix = "Give another file with init.file=<path>."
        if release is not None:
            fix = f"Download {release.url} ({release.licence}), then: python -m tools.import_weights " + (
                f"{release.family} {release.file} --out {Path(file).parent}"
            )
        yield Finding(
            group="weights", name=path.stem, state=OK if there else ABSENT, what=file if there else f"no {file}",
            fix="" if there else fix,
        )  # fmt: skip
    for path in sorted((ROOT / "conf" / "evaluate").glob("*.yaml")):
        for name in _with_parents("evaluate", path.stem).get("extractors") or {}:
            places = _read("evaluate", path.stem, f"evaluate.extractors.{name}.weights", folder)
            if places and (path.stem, name) not in seen:
                seen.add((path.stem, name))
                places = [places] if isinstance(places, str) else places
                there = next((place for place in places if Path(place).is_file()), None)
                yield Finding(
                    group="weights", name=f"metric {name}", state=OK if there else ABSENT,
                    what=there or f"no {' or '.join(places)}", fix="" if there else _metric_fix(name),
                )  # fmt: skip


def _metric_fix(name: str) -> str:
    if name != "inception":
        return f"Needed for FD-{name} only: put the file there, or set DATA_ROOT to the folder that holds weights/."
    from common.metrics.features import INCEPTION_URL

    return f"Needed for FID only. Download {INCEPTION_URL} to that place."


def folders() -> Iterable[Finding]:
    """Where runs, sweeps and caches are written: writable, and room on the disk."""
    for name, variable, default in (("outputs", "ONESTEP_OUTPUTS", "outputs"), ("cache", "ONESTEP_CACHE", ".cache")):
        yield _folder(name, Path(os.environ.get(variable) or default), variable)


def _folder(name: str, path: Path, variable: str) -> Finding:
    finding: dict[str, Any] = dict(group="folders", name=name, needed=True)
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    fix = f"Set {variable} to a folder you can write to."
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = "is a file" if existing.is_file() else error.strerror
        return Finding(**finding, state=BROKEN, what=f"{path} is not writable: {existing} {reason}", fix=fix)
    free = shutil.disk_usage(existing).free / 2**30
    if free < 0.5:
        return Finding(**finding, state=BROKEN, what=f"{path}: {free:.2f} GiB free", fix=f"Free 0.5 GiB. Or: {fix}")
    return Finding(**finding, state=OK, what=f"{path}: writable, {free:.0f} GiB free")


def parse(argv: list[str]) -> tuple[str | None, str | None, bool]:
    """(data set asked for, data root, whether to list everything). Raises UserError for any other word."""
    values: dict[str, str] = {}
    for word in argv:
        if word == "--all":
            continue
        key, equals, value = word.partition("=")
        if not equals or key not in ("data", "data.root") or not value:
            raise UserError(f"{word!r} is not an option. Options: --all, data=<name>, data.root=<folder>.")
        values[key] = value
    asked = values.get("data")
    names = data_names()
    if asked is not None and asked not in names:
        raise UserError(f"Data set '{asked}' does not exist. {nearest(asked, names)}One of: {', '.join(names)}.")
    return asked, values.get("data.root"), "--all" in argv


def summary(group: str, findings: list[Finding]) -> str:
    """One line on a group: how many work, and the names of what does not."""
    good = sum(finding.state == OK for finding in findings)
    parts = [f"{good} of {len(findings)} ok"]
    for state in (BROKEN, ABSENT):
        names = [finding.name for finding in findings if finding.state == state]
        if names:
            shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            parts.append(f"{state}: {shown}")
    return f"{group:<10}{'; '.join(parts)}"


def show(findings: list[Finding]) -> None:
    """Prints the table; each fix is printed below its finding."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "state", "found"):
        table.add_column(column, overflow="fold")
    styles, last = {OK: "green", ABSENT: "yellow", BROKEN: "bold red"}, None
    for finding in findings:
        group = finding.group if finding.group != last else ""
        last = finding.group
        found = finding.what if finding.state == OK or not finding.fix else f"{finding.what}\n  {finding.fix}"
        table.add_row(group, finding.name, Text(finding.state, style=styles[finding.state]), Text(found))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 (something needed is broken) or 2 (unknown option)."""
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        asked, root, everything = parse(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    if asked:
        findings = list(data_sets([asked], root, asked))
    else:
        findings = []
        for group, look in (
            ("packages", packages), ("machine", machine), ("data", lambda: data_sets(data_names(), root)),
            ("weights", lambda: weights(root)), ("folders", folders),
        ):  # fmt: skip
            print(f"looking at {group} ...", end="\r" if sys.stdout.isatty() else "\n", flush=True)
            findings += (found := list(look()))
            print(summary(group, found), flush=True)
    broken = [finding for finding in findings if finding.state == BROKEN]
    if asked or everything:
        show(findings)
    elif broken:
        print()
        show(broken)
    absent = [finding for finding in findings if finding.state == ABSENT]
    if broken:
        print(f"\n{len(broken)} needed and broken: {', '.join(finding.name for finding in broken)}.")
        return 1
    print(f"\n{'This data set is' if asked else 'Everything for `make demo` is'} ready.", end="")
    more = "" if asked or everything else " What each is for and how to get it: python -m tools.doctor --all"
    print(f" {len(absent)} optional things are absent.{more}" if absent else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
