"""The notebook: short, without outputs, and every cell of it runs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "runners" / "quickstart.ipynb"


def test_the_notebook_has_fewer_than_40_lines_of_code_and_no_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    assert 10 < len(lines) < 40
    assert [cell.id for cell in cells if cell.outputs or cell.execution_count is not None] == []


def test_every_cell_of_the_notebook_runs_and_it_ends_with_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5  # samples of the policy, the schedule, two galleries, one overlay
    text = "".join(output.get("text", "") for output in outputs)
    assert text.count("status") == 0  # the command line's words stay there
    table = notebook.cells[-2].outputs[-1]["text"]
    assert "batch" in table and "layer" in table
    page = tmp_path / "runs" / "comparison" / "compare.html"
    assert page.stat().st_size > 1_000_000
