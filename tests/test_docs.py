"""The documentation against the code: generated tables, links, examples, and what the pages say exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import generate_spec  # noqa: E402
from test_architecture import TORCH_IN_NODE  # noqa: E402

PAGES = sorted(DOCS.rglob("*.md"))
ROOT_PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
EXAMPLE_S = 100


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", generate_spec.PAGES)
def test_message_tables_are_those_of_the_code(page):
    assert (DOCS / "spec" / page).read_text() == generate_spec.rendered(page), "run: python docs/generate_spec.py"


@pytest.mark.parametrize("page", PAGES + ROOT_PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES + ROOT_PAGES, ids=name)
def test_files_named_in_pages_exist(page):
    for path in re.findall(
        r"`((?:node|protocol|routing|kernels|tests|docs)/[\w/.-]+\.(?:py|md|json))`", page.read_text()
    ):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"


def test_architecture_page_lists_what_loads_torch():
    page = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"`(node/[\w/]+\.py)`", page.partition("loads torch")[2].partition("\n\n")[0]))
    assert named == {module.removeprefix("swarmnode.").replace(".", "/") + ".py" for module in TORCH_IN_NODE}


def test_makefile_names_are_those_the_docs_use():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES + ROOT_PAGES:
        assert set(re.findall(r"`make ([a-z-]+)`", page.read_text())) <= targets, name(page)


def run_example(script: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-P", str(DOCS / "examples" / script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=EXAMPLE_S)


@pytest.mark.weights
def test_embedding_example_never_holds_the_loop_up():
    run = run_example("embedding.py")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "worst delay" in run.stdout


@pytest.mark.weights
@pytest.mark.e2e
@pytest.mark.slow
def test_demo_ends_well():
    run = run_example("demo.py")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "The same 64 tokens both times" in run.stdout
