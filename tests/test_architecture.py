"""What the layout promises, checked: packages, imports, start-up cost, forbidden calls, and what a wheel holds.

Import directions themselves are import-linter's contracts in setup.cfg (`make check`).
"""

import ast
import configparser
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("protocol", "routing", "kernels", "node")
ROOT_FILES = {"__init__.py", "cli.py"}
HELP_CPU_S = 0.150
DHT_NODE_MIB = 45

TORCH_IN_NODE = {
    "swarmnode.node.client.local",
    "swarmnode.node.server.compute",
    "swarmnode.node.server.weights",
}
"""The modules of node/ that may load torch when imported; docs/architecture.md lists the same."""
TORCH_FREE_KERNELS = {
    "swarmnode.kernels",
    "swarmnode.kernels.beams",
    "swarmnode.kernels.chat",
    "swarmnode.kernels.loading",
    "swarmnode.kernels.loading.gguf_file",
    "swarmnode.kernels.loading.vocabulary",
    "swarmnode.kernels.models",
    "swarmnode.kernels.models.config",
    "swarmnode.kernels.models.huggingface",
    "swarmnode.kernels.quant",
    "swarmnode.kernels.speculative",
    "swarmnode.kernels.tokenizer",
}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}


def sources() -> list[Path]:
    """Every file of the package."""
    return [ROOT / name for name in sorted(ROOT_FILES)] + [
        path for part in PARTS for path in sorted((ROOT / part).rglob("*.py"))
    ]


def dotted(path: Path) -> str:
    """The module name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["swarmnode", *(part for part in parts if part != "__init__")])


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def loaded_by(modules: list[str], watched: set[str]) -> set[str]:
    """Which of the watched top-level modules a fresh interpreter has after importing these."""
    code = f"import importlib, json, sys\nfor name in {sorted(modules)}: importlib.import_module(name)\n"
    found = python(code + f"print(json.dumps([name for name in {sorted(watched)} if name in sys.modules]))")
    return set(json.loads(found))


def test_packages_listed_in_setup_cfg_are_those_on_disk() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    assert listed == sorted(dotted(path) for path in sources() if path.name == "__init__.py")


def test_root_holds_no_other_modules() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == ROOT_FILES


def test_root_module_is_small_and_lazy() -> None:
    assert len((ROOT / "__init__.py").read_text().splitlines()) <= 25
    assert python("import sys; import swarmnode; print([m for m in sys.modules if m.startswith('swarmnode.')])") == "[]"
    assert python("from swarmnode import Node, NodeConfig, SwarmError; print(Node.__name__)") == "Node"


def test_torch_is_loaded_only_where_it_may_be() -> None:
    free = [name for name in map(dotted, sources()) if ".kernels" not in name and name not in TORCH_IN_NODE]
    assert loaded_by([*free, *TORCH_FREE_KERNELS], {"torch", "bitsandbytes", "transformers"}) == set()


def test_wire_and_decisions_need_neither_a_loop_nor_tensors() -> None:
    pure = [name for name in map(dotted, sources()) if name.startswith(("swarmnode.protocol", "swarmnode.routing"))]
    assert loaded_by(pure, {"asyncio", "numpy", "socket", "torch"}) == set()


def test_help_costs_nothing() -> None:
    loaded = python(
        "import sys\nfrom swarmnode.cli import run\nrun(['--help'])\n"
        "print([n for n in ('asyncio', 'rich', 'ssl', 'torch', 'numpy', 'cryptography') if n in sys.modules])"
    )
    assert loaded.endswith("\n[]")
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-P", "-m", "swarmnode.cli", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < HELP_CPU_S


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_dht_only_node_is_small(tmp_path: Path) -> None:
    folders = {f"SWARMNODE_{name}_DIR": str(tmp_path / name) for name in ("DATA", "STATE", "CACHE")}
    settings = tmp_path / "config.toml"
    settings.touch()
    command = ["join", "--serve", "none", "--listen", "/ip4/127.0.0.1/tcp/0"]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "swarmnode.cli", *command],
        env=os.environ | folders | {"SWARMNODE_CONFIG": str(settings)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as node:
        try:
            assert node.stdout is not None
            assert node.stdout.readline().startswith("READY ")
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{node.pid}/status").read_text().splitlines())
            mapped = Path(f"/proc/{node.pid}/maps").read_text()
        finally:
            node.send_signal(signal.SIGINT)
    assert node.returncode == 0
    assert "libtorch" not in mapped
    assert int(fields["VmRSS"].split()[0]) < DHT_NODE_MIB * 1024


@pytest.mark.parametrize("path", sources(), ids=dotted)
def test_nothing_that_runs_what_a_file_or_peer_says(path: Path) -> None:
    source = path.read_text()
    assert "trust_remote_code" not in source
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                assert not FORBIDDEN_IMPORTS & {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module=str(module), level=0):
                assert module.partition(".")[0] not in FORBIDDEN_IMPORTS
            case ast.Call(func=ast.Name(id=name)):
                assert name not in FORBIDDEN_CALLS
            case ast.Attribute(value=ast.Name(id="torch"), attr=attribute):
                assert attribute != "load"


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "site", "docs", "*.egg-info", "__pycache__", "node_modules")
    shutil.copytree(ROOT, tree, ignore=skipped)
    build = [sys.executable, "-P", "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(tree)], check=True, timeout=110)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(
        ["swarmnode/py.typed"] + [f"swarmnode/{path.relative_to(ROOT).as_posix()}" for path in sources()]
    )
