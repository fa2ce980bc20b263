"""Import directions (rule R1), read from the source with ast: projects -> common -> third party, never sideways."""

import ast
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
STDLIB = set(sys.stdlib_module_names)
BASE = {"torch", "torchvision", "timm", "numpy", "scipy"}

# PIL where pictures are read or written; yaml comes with omegaconf.
# package of common -> (third party it may import, packages of common it may import)
LOW = {"deq", "diffusion", "ham", "losses", "nets", "optim"}
LAYERS = {
    **{name: (BASE, LOW) for name in LOW},
    "nets": (BASE | {"triton"}, LOW),
    # the names of the torchdeq library over common.deq; nothing of ours imports it
    "torchdeq": (BASE, {"deq", "torchdeq"}),
    # diffusers: optional, for the autoencoder of latents
    "weights": (BASE | {"safetensors", "diffusers"}, LOW | {"weights"}),
    "data": (BASE | {"lightning", "PIL", "sklearn", "skimage", "safetensors"}, {"data"}),
    "metrics": (
        BASE | {"torch_fidelity", "torchmetrics", "sklearn", "safetensors", "PIL"},
        LOW | {"weights", "data", "metrics"},
    ),
    "runtime": (
        BASE | {"hydra", "omegaconf", "lightning", "rich", "matplotlib", "PIL", "yaml"},
        LOW | {"weights", "data", "metrics", "runtime"},
    ),
    # LightningModules that two or more papers share
    "tasks": (
        BASE | {"lightning", "PIL", "matplotlib"},
        LOW | {"weights", "data", "metrics", "runtime", "tasks"},
    ),
}
# Rooms of the runtime: training stands below the two others, which use each other.
ROOMS = {"cli": {"cli", "verbs", "training"}, "verbs": {"cli", "verbs", "training"}, "training": {"training"}}
# The ground floor: modules everybody may use -> third party they may import; they import each other alone.
FLOOR = {
    "errors": set(), "files": set(), "archives": {"numpy"}, "targets": set(), "limits": set(), "tensors": {"torch"},
}  # fmt: skip
# Old import paths that stay: file -> what it hands on
ALIASES = {"common/deq/torchdeq_api.py": "common.torchdeq.api"}
HEAVY = {"torch", "torchvision", "timm", "lightning", "scipy", "sklearn", "matplotlib", "numpy", "safetensors"}
LIGHT_FILES = ("projects/run.py", "common/runtime/cli/launch.py", "common/runtime/cli/check.py", "common/errors.py")


def python_files(*folders):
    return sorted(path for folder in folders for path in (REPO / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def imports(source: str, *, top_only: bool = False) -> list[tuple[int, str]]:
    """(line, absolute dotted module) of every import; `from a import b` counts as a.b. Relative imports keep dots."""
    tree = ast.parse(source)
    nodes = list(_top_level(tree.body)) if top_only else list(ast.walk(tree))
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{base}.{alias.name}" if base.strip(".") else base) for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value)))
    return found


def _top_level(body):
    """Statements that run on import: not those inside functions or `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _top_level(getattr(node, part, []) or [])
        for handler in getattr(node, "handlers", []):
            yield from _top_level(handler.body)


def wrong_imports(file: str, source: str) -> list[str]:
    """What breaks the rule in the source of the file at that path."""
    parts = Path(file).with_suffix("").parts
    return [
        f"{file}:{line} imports {module}: {why}"
        for line, module in imports(source)
        if (why := _why_not(parts, module.split(".")))
    ]


def _why_not(parts: tuple[str, ...], module: list[str]) -> str | None:
    root = module[0]
    if root == "":
        return "relative imports hide the direction; write the full path"
    if root in STDLIB:
        return None
    if root in ("conf", "tests"):
        return f"{root} is never imported"
    area = parts[0]
    if area == "tools":
        return None
    if area == "projects":
        if root == "tools":
            return "projects do not use tools"
        own = len(parts) > 2 and len(module) > 1 and module[1] == parts[1]
        return (
            "a project never imports another project; move what both need to common"
            if (root == "projects" and not own)
            else None
        )
    if root in ("projects", "tools"):
        return f"common never imports {root}"
    return _why_not_in_common(parts, module)


def _why_not_in_common(parts: tuple[str, ...], module: list[str]) -> str | None:
    layer = parts[1]
    own = module[0] == "common" and len(module) > 1
    if layer in FLOOR:
        known = module[1] in FLOOR if own else module[0] in FLOOR[layer]
        return None if known else f"common.{layer} is of the ground floor: {', '.join(FLOOR)} and its own third party"
    if ALIASES.get("/".join(parts) + ".py") == ".".join(module):
        return None
    third_party, inside = LAYERS[layer]
    if module[0] != "common":
        return None if module[0] in third_party else f"common.{layer} may import {', '.join(sorted(third_party))}"
    target = module[1] if own else ""
    if layer == target == "runtime":
        return _why_not_in_rooms(parts, module)
    return None if target in inside | set(FLOOR) else f"common.{layer} may use common.{{{', '.join(sorted(inside))}}}"


def _why_not_in_rooms(parts: tuple[str, ...], module: list[str]) -> str | None:
    if len(module) < 3 or parts[2] not in ROOMS or module[2] not in ROOMS:
        return None
    below = ROOMS[parts[2]]
    return None if module[2] in below else f"common.runtime.{parts[2]} may use {', '.join(below)} of the runtime"


@pytest.mark.parametrize("path", python_files("common", "projects", "tools"), ids=name_of)
def test_import_directions(path):
    wrong = wrong_imports(name_of(path), path.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "file, line",
    [
        ("common/nets/unet.py", "import lightning"),
        ("common/nets/unet.py", "from common.weights.load import load_into"),
        ("common/nets/unet.py", "def f():\n    from common.runtime.cli import launch"),
        ("common/diffusion/sample.py", "import safetensors"),
        ("common/data/images/cifar.py", "import hydra"),
        ("common/data/images/cifar.py", "from common.nets import unet"),
        ("common/metrics/fid.py", "from projects.ect import module"),
        ("common/metrics/fid.py", "import omegaconf"),
        ("common/weights/load.py", "import tools.doctor"),
        ("common/runtime/cli/launch.py", "import projects"),
        ("common/errors.py", "import torch"),
        ("common/files.py", "from common.nets import unet"),
        ("projects/run.py", "from projects.ect import module"),
        ("projects/ect/module.py", "from projects.edm.module import Edm"),
        ("projects/ect/module.py", "import projects.edm.module"),
        ("projects/run.py", "import conf.thing"),
        ("common/deq/solve.py", "import lightning"),
        ("common/deq/layer.py", "from common.runtime.training.seeding import Draws"),
        ("common/deq/layer.py", "from common.torchdeq import api"),
        ("common/runtime/training/ema.py", "from common.runtime.verbs import fit"),
        ("common/limits.py", "import torch"),
        ("common/limits.py", "from common.nets import unet"),
        ("common/runtime/verbs/fit.py", "from common.tasks.segmentation import Segmentation"),
        ("common/tasks/segmentation.py", "import hydra"),
        ("common/nets/unet.py", "from . import layers"),
        ("common/nets/unet.py", "import importlib\nimportlib.import_module('hydra')"),
    ],
)
def test_the_rule_catches(file, line):
    assert wrong_imports(file, line)


@pytest.mark.parametrize(
    "file, line",
    [
        ("common/nets/unet.py", "import math\nimport torch\nfrom common.nets.layers import Conv2d"),
        ("projects/ect/module.py", "from projects.ect.method import f\nfrom common.losses import consistency"),
        ("common/runtime/cli/launch.py", "import hydra\nfrom common.metrics.fid import fid"),
        ("common/nets/mdeq.py", "from common.deq.layer import DEQ"),
        ("common/tasks/graph.py", "from lightning.pytorch import Callback\nfrom common.runtime.training import module"),
        ("tools/doctor.py", "from common.data.images import cifar\nimport rich"),
    ],
)
def test_the_rule_allows(file, line):
    assert not wrong_imports(file, line)


def modules(*folders) -> dict[str, Path]:
    """Dotted name -> file of every module below the folders, packages' own files left out."""
    files = (path for path in python_files(*folders) if path.name != "__init__.py")
    return {".".join(path.relative_to(REPO).with_suffix("").parts): path for path in files}


def import_graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules among `files` it imports anywhere in its source."""
    graph = {}
    for name, path in files.items():
        named = {module for _, module in imports(path.read_text(encoding="utf-8"))}
        graph[name] = {m for entry in named for m in (entry, entry.rpartition(".")[0]) if m in files and m != name}
    return graph


def test_no_import_circles():
    """Also none through imports inside functions: what must not be imported at the top shows a wrong border."""
    left = import_graph(modules("common", "projects", "tools"))
    while ends := {name for name, used in left.items() if not used & left.keys()}:
        left = {name: used for name, used in left.items() if name not in ends}
    assert not left, f"imported in circles, or importing such a module: {', '.join(sorted(left))}"


def test_every_package_of_common_has_a_rule():
    packages = {path.name for path in (REPO / "common").iterdir() if (path / "__init__.py").is_file()}
    assert packages == set(LAYERS)


def test_conf_and_tests_are_no_packages():
    assert not list((REPO / "conf").rglob("*.py"))
    assert not list((REPO / "tests").rglob("__init__.py"))


def test_common_packages_are_empty_at_the_top():
    for path in (REPO / "common").rglob("__init__.py"):
        assert not path.read_text(encoding="utf-8").strip(), f"{name_of(path)} runs code on import"


@pytest.mark.parametrize("file", LIGHT_FILES)
def test_start_up_files_import_nothing_heavy_at_the_top(file):
    """`python -m projects.run --help` answers at once; follows imports inside the repository."""
    seen, todo = set(), [file]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for line, module in imports((REPO / current).read_text(encoding="utf-8"), top_only=True):
            assert module.split(".")[0] not in HEAVY, f"{file} reaches {current}:{line}, which imports {module}"
            for depth in (len(module.split(".")), len(module.split(".")) - 1):
                inner = "/".join(module.split(".")[:depth]) + ".py"
                if module.startswith(("common.", "projects.")) and (REPO / inner).is_file():
                    todo.append(inner)


def test_heavy_finder_sees_through_try_and_ignores_functions():
    source = "try:\n    import torch\nexcept ImportError:\n    torch = None\ndef f():\n    import numpy\n"
    assert [module for _, module in imports(source, top_only=True)] == ["torch"]
