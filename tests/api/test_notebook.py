"""The notebook of manifests/tiny-pusa, in a real kernel: it runs, shows videos, and survives an interrupt."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jupyter_client.manager import start_new_kernel

NOTEBOOK = "manifests/tiny-pusa/notebook.ipynb"
SECONDS = 300
Message = dict[str, Any]


def cells_of(root: Path) -> list[dict]:
    return json.loads((root / NOTEBOOK).read_text())["cells"]


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory) -> Path:
    """Return a copy of the notebook's folder, whose manifest has one job of one step."""
    folder = Path(shutil.copytree((root / NOTEBOOK).parent, tmp_path_factory.mktemp("notebook") / "tiny-pusa"))
    manifest = yaml.safe_load((folder / "generate.yaml").read_text())
    manifest["defaults"]["steps"], manifest["jobs"] = 1, manifest["jobs"][:1]
    (folder / "generate.yaml").write_text(yaml.safe_dump(manifest))
    return folder


@pytest.fixture(scope="module")
def kernel(folder) -> Iterator[tuple[Callable, Callable]]:
    """Yield a function that runs code and returns the reply and what was shown, and one that interrupts it."""
    manager, client = start_new_kernel(cwd=str(folder), startup_timeout=SECONDS)

    def run(code: str, look: Callable[[Message], None] = lambda content: None) -> tuple[Message, list[Message]]:
        shown: list[Message] = []

        def note(message: Message) -> None:
            shown.append(message["content"])
            look(message["content"])

        return client.execute_interactive(code, timeout=SECONDS, output_hook=note)["content"], shown

    yield run, manager.interrupt_kernel
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_the_notebook_is_stored_without_outputs(root):
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells_of(root))


def test_the_notebook_runs_and_shows_its_videos(root, folder, kernel):
    run, _ = kernel
    sources = ["".join(cell["source"]) for cell in cells_of(root) if cell["cell_type"] == "code"]
    assert sum('"steps": 20' in source for source in sources) == 1
    shown: list[Message] = []
    for source in sources:
        reply, outputs = run(source.replace('"steps": 20', '"steps": 1'))
        assert reply["status"] == "ok", reply
        shown += outputs
    pages = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert len(pages) == 3 and all("<video" in page and "data:video/mp4;base64," in page for page in pages)
    errors = "".join(output["text"] for output in shown if output.get("name") == "stderr")
    left = [line.rpartition("\r")[2].strip() for line in errors.split("\n")]  # as a terminal shows it
    assert not any(left), "a bar stays, or a library warns"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


def test_an_interrupted_cell_leaves_the_model_usable(kernel):
    run, interrupt = kernel
    size = {"width": 64, "height": 64, "num_frames": 31, "guidance": 1}
    assert run(f"import pusa; model = pusa.load('builtin:tiny-pusa', defaults={size})")[0]["status"] == "ok"
    interrupted: list[bool] = []

    def interrupt_once(content: Message) -> None:
        if "/10000 [" in content.get("text", "") and not interrupted:  # its bar
            interrupted.append(True)
            interrupt()

    reply, _ = run("model.generate(steps=10000)", interrupt_once)
    assert reply.get("ename") == "KeyboardInterrupt", reply
    assert run("assert model.generate(steps=1).frames.shape == (31, 64, 64, 3)")[0]["status"] == "ok"
