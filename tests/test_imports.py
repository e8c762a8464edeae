"""What `import fastclip` loads, and the only direction imports may take."""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastclip
from fastclip.backends import cpu

PACKAGE = Path(fastclip.__file__).parent

FORBIDDEN = (
    *("triton", "optuna", "sklearn", "matplotlib", "click", "rich", "ray", "pandas", "scipy", "tensorboard"),
    *(
        "fastclip.tuner",
        "fastclip.pages",
        "fastclip.bench",
        "fastclip.demo",
        "fastclip.cli",
        "fastclip.kernels",
    ),
)

# What lies under each layer of a folder, highest first; a module may import its own layer and those below.
LAYERS = {
    "": (
        ("cli",),
        ("demo",),
        ("bench",),
        ("tuner",),
        ("monitor",),
        ("pages",),
        ("files",),
        ("optim",),
        ("strategies",),
        ("patch",),
        ("clip_grad", "norms"),
        ("distributed",),
        ("backends",),
        ("kernels", "_C"),
        ("reference",),
        ("errors", "_version"),
    ),
    "cli": (("__main__",), ("bench", "demo"), ("options",)),
    "backends": (("triton", "cuda"), ("devices",), ("cpu", "eager"), ("read_step",), ("base",), ("step",)),
    "kernels": (
        ("thresholds",),
        ("step",),
        ("coefficients", "norm"),
        ("units",),
        ("scale", "elementwise", "nonfinite"),
        ("accumulate",),
        ("tiles",),
        ("columns", "blocks"),
        ("step_table", "unit_table"),
        ("table",),
    ),
    "distributed": (("everywhere",), ("shards",), ("plan",), ("payload", "reading", "marks")),
    "strategies": (
        ("packing",),
        ("skip",),
        ("percentile", "zscore", "median_mad", "quantile_servo", "ema", "norm_stabilised"),
        ("fixed", "schedule", "agc", "per_tensor", "value", "block_rms"),
        ("base",),
        ("within", "windows", "on_device"),
    ),
    "optim": (
        ("attach", "grad_scaler"),
        ("wrapper",),
        ("checkpoints", "closures"),
        ("routes",),
        ("native", "torch_fused", "plain"),
        ("deciding",),
        ("gradients",),
        ("settings",),
        ("outcome", "callers"),
    ),
    "monitor": (
        ("cli",),
        ("report",),
        ("terminal", "pictures"),
        ("suggestion",),
        ("bins",),
        ("reading",),
        ("monitor",),
        ("writers",),
        ("records",),
        ("parameters", "alarms"),
        ("blocks", "history"),
    ),
    "pages": (("pictures",), ("template", "style", "ticks")),
    # The files of a search on top of four folders.
    "tuner": (
        ("cli",),
        ("config",),
        ("cross_validation", "suggest", "estimators"),
        ("tuner_cv",),
        ("predicting",),
        ("report", "progress", "loggers"),
        ("study",),
        ("executors", "data"),
        ("training",),
        ("errors",),
    ),
    # The engine lies under the steps.
    "bench": (
        ("suite", "table", "report"),
        ("sections", "targets", "device_plot"),
        ("plot", "distributed", "launches", "strategies", "training"),
        ("steps",),
        ("runner",),
        ("results",),
        ("check", "bandwidth"),
        ("cases",),
        ("devices", "peers"),
        ("models", "timing", "environment", "isolation", "progress"),
    ),
    "demo": (
        ("run",),
        ("comparison_table",),
        ("comparison", "rescue"),
        ("training",),
        ("report", "plot", "outcomes"),
        ("history",),
        ("search", "runs"),
        ("studies",),
        ("tasks",),
        ("data",),
        ("models", "clip_then_step"),
    ),
}


def ranks(layers: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    return {name: rank for rank, names in enumerate(layers) for name in names}


STATEMENTS = (
    "import fastclip",
    "import fastclip.bench.suite",
    "print('noise')",
    "import fastclip.tuner.executors.processes",
    "from fastclip.tuner import TunerCV",
)
Loaded = dict[str, tuple[set[str], str]]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """Statement -> modules that a fresh interpreter has after it and those above, and what it printed."""
    code = (
        "import sys\n"
        "for statement in sys.argv[1:]:\n"
        "    exec(statement)\n"
        "    print(end='MODULES ' + ' '.join(sys.modules) + '\\n', flush=True)\n"
    )
    command = [sys.executable, "-c", code, *STATEMENTS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    told = re.findall(r"(.*?)MODULES (.*?)\n", done.stdout, re.DOTALL)
    return {s: (set(modules.split()), text) for s, (text, modules) in zip(STATEMENTS, told, strict=True)}


def forbidden_in(modules: set[str]) -> set[str]:
    return {m for m in modules if m in FORBIDDEN or any(m.startswith(f + ".") for f in FORBIDDEN)}


def test_import_loads_nothing_heavy_but_torch(loaded: Loaded) -> None:
    modules, printed = loaded["import fastclip"]
    assert forbidden_in(modules) == set()
    assert {"torch", "fastclip.clip_grad"} <= modules
    assert "torch.distributed.tensor" not in modules
    assert printed == ""


def test_a_worker_that_trains_folds_loads_no_search(loaded: Loaded) -> None:
    heavy = {"optuna", "sklearn", "scipy", "sqlalchemy", "joblib", "matplotlib", "pandas"}
    modules, printed = loaded["import fastclip.tuner.executors.processes"]
    assert heavy & modules == set()
    assert {m for m in modules if m.startswith("fastclip.tuner.study")} == set()
    assert printed == ""
    modules, _ = loaded["from fastclip.tuner import TunerCV"]  # the test of this test
    assert {"optuna", "sklearn", "fastclip.tuner.study.search"} <= modules


def test_the_tuner_has_the_names_it_lists() -> None:
    import fastclip.tuner as tuner

    assert sorted(tuner._HOME_OF) == sorted(tuner.__all__)
    assert all(getattr(tuner, name).__module__.startswith("fastclip.tuner.") for name in ("TunerCV", "Float"))
    assert set(tuner.__all__) <= set(dir(tuner))
    assert all(hasattr(tuner, name) for name in tuner.__all__)
    with pytest.raises(AttributeError, match="no attribute 'TunerVC'"):
        tuner.TunerVC  # noqa: B018


def test_the_boundary_is_seen_to_be_crossed(loaded: Loaded) -> None:
    """The test of the test above: a module that loads what it may not is found out."""
    modules, printed = loaded["import fastclip.bench.suite"]
    assert "fastclip.bench" in forbidden_in(modules)
    # benchmarks/gpu.py runs where nothing but torch is installed.
    assert {m for m in forbidden_in(modules) if not m.startswith("fastclip.bench")} == set()
    assert printed == ""
    assert loaded["print('noise')"][1] == "noise\n"


def imports_of(path: Path, prefix: str) -> Iterator[str]:
    """What a file imports of the package with this dotted prefix, anywhere in it: first names below it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith(prefix):
                yield name.removeprefix(prefix).partition(".")[0]


def upward_imports(folder: str, root: Path = PACKAGE) -> list[str]:
    """Every import that goes against the layers of a folder of the package, which lies in `root`."""
    rank, package = ranks(LAYERS[folder]), root / folder
    prefix = f"fastclip.{folder}." if folder else "fastclip."
    found = []
    for path in sorted(package.rglob("*.py")):
        layer = path.relative_to(package).with_suffix("").parts[0]
        if layer == "__init__":
            continue  # it re-exports
        targets = (target for target in imports_of(path, prefix) if target in rank)
        found += [f"{layer} -> {target}" for target in targets if rank[target] < rank[layer]]
    return found


def modules_in(package: Path) -> set[str]:
    return {
        p.stem if p.is_file() else p.name
        for p in package.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").is_file()
    } - {"__init__"}


every_folder = pytest.mark.parametrize("folder", LAYERS, ids=lambda folder: folder or "fastclip")


@every_folder
def test_layers_are_the_modules_there_are(folder: str) -> None:
    assert set(ranks(LAYERS[folder])) - {"_C"} == modules_in(PACKAGE / folder)


def test_every_folder_has_its_layers() -> None:
    """Those within folders of one subject aside, of which the test of circles says enough."""
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(LAYERS) - {""}


@every_folder
def test_imports_go_down(folder: str) -> None:
    assert upward_imports(folder) == []


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "fastclip"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with (copy / "backends" / "eager.py").open("a") as file:
        file.write("\ndef late():\n    from fastclip import clip_grad\n    return clip_grad\n")
    assert upward_imports("", copy) == ["backends -> clip_grad"]
    with (copy / "tuner" / "training" / "data.py").open("a") as file:
        file.write("\ndef late():\n    import fastclip.tuner.study.search\n")
    assert upward_imports("tuner", copy) == ["training -> study"]


def modules_imported_by(path: Path, known: set[str]) -> set[str]:
    """The modules of fastclip that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        else:
            continue
        found |= known.intersection(names)
    return found


def circles(package: Path) -> list[str]:
    """Modules of a package that import each other, by whatever detour."""
    files = {
        ".".join(("fastclip", *path.relative_to(package).with_suffix("").parts)): path
        for path in package.rglob("*.py")
        if path.name != "__init__.py"  # they re-export
    }
    order = graphlib.TopologicalSorter(
        {name: modules_imported_by(path, set(files)) - {name} for name, path in files.items()}
    )
    try:
        order.prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_by_a_detour() -> None:
    assert circles(PACKAGE) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "fastclip"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with (copy / "optim" / "outcome.py").open("a") as file:
        file.write("\ndef late():\n    from fastclip.optim import plain\n    return plain\n")
    assert {"fastclip.optim.outcome", "fastclip.optim.plain"} <= set(circles(copy))


def test_public_names_are_those_that_all_lists() -> None:
    assert sorted(fastclip.__all__) == fastclip.__all__
    assert set(fastclip.__all__) <= set(dir(fastclip))
    assert all(getattr(fastclip, name).__doc__ or name == "__version__" for name in fastclip.__all__)


@pytest.mark.skipif(cpu._C is None, reason="needs the C++ extension")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_extension_is_linked_to_neither_torch_nor_openmp() -> None:
    def readelf(option: str) -> str:
        return subprocess.run(
            ["readelf", "--wide", option, cpu._C.__file__], capture_output=True, text=True, check=True
        ).stdout

    needed = [line for line in readelf("--dynamic").splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [
        line for line in needed if any(name in line for name in ("torch", "c10", "gomp", "iomp", "omp5"))
    ]
    undefined = [line for line in readelf("--dyn-syms").splitlines() if " UND " in line]
    assert undefined
    assert not [
        line for line in undefined if any(name in line for name in ("c10", "torch", "aten", "THPVariable"))
    ]
    defined = [
        line.split()[-1]
        for line in readelf("--dyn-syms").splitlines()
        if " GLOBAL " in line and " UND " not in line
    ]
    assert [name for name in defined if not name.startswith("_ZSt")] == ["PyInit__C"]
