"""The notebook of manifests/tiny-pusa, in a real kernel: it runs, shows videos, and survives an interrupt."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

NOTEBOOK = "manifests/tiny-pusa/notebook.ipynb"
SECONDS = 300


def test_the_notebook_is_stored_without_outputs(root):
    notebook = nbformat.read(root / NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_the_notebook_runs_and_shows_its_videos(root, tmp_path):
    folder = Path(shutil.copytree((root / NOTEBOOK).parent, tmp_path / "tiny-pusa"))
    manifest = (folder / "generate.yaml").read_text()
    (folder / "generate.yaml").write_text(manifest.replace("steps: 20", "steps: 2"))
    text = (root / NOTEBOOK).read_text()
    notebook = nbformat.reads(text.replace('\\"steps\\": 20', '\\"steps\\": 2'), 4)
    assert "steps: 20" in manifest and '\\"steps\\": 20' in text
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, resources=resources, coalesce_streams=True).execute()  # raises errors
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(pages) == 3 and all("<video" in page and "data:video/mp4;base64," in page for page in pages)
    errors = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not any(text.strip() for text in errors), "a bar stays, or a library warns"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


@pytest.fixture
def kernel(tmp_path) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(cwd=str(tmp_path), startup_timeout=SECONDS)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel()


def test_an_interrupted_cell_leaves_the_model_usable(kernel):
    manager, client = kernel
    size = {"width": 64, "height": 64, "num_frames": 31, "guidance": 1}

    def run(code: str) -> dict:
        return client.execute_interactive(code, timeout=SECONDS, output_hook=lambda message: None)["content"]

    assert run(f"import pusa; model = pusa.load('builtin:tiny-pusa', defaults={size})")["status"] == "ok"
    interrupted: list[bool] = []

    def interrupt(message: dict) -> None:
        """Interrupt the cell once its bar shows a step."""
        if "/10000 [" in message["content"].get("text", "") and not interrupted:
            interrupted.append(True)
            manager.interrupt_kernel()

    reply = client.execute_interactive("model.generate(steps=10000)", timeout=SECONDS, output_hook=interrupt)
    assert reply["content"].get("ename") == "KeyboardInterrupt", reply["content"]
    assert run("assert model.generate(steps=2).frames.shape == (31, 64, 64, 3)")["status"] == "ok"
