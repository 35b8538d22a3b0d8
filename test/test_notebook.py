"""The Python API inside a notebook's kernel, where an event loop runs already and output streams are not files."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = (
    "from sglang import DiffGenerator\ngenerator = DiffGenerator.from_pretrained('demo')",
    "wish = {'prompt': 'a blue star', 'num_frames': 1, 'num_inference_steps': 2, 'seed': 5, 'return_frames': True}\n"
    "first = generator.generate(wish)\nprint(first.frames.shape, first.seed)",
    "second = await generator.generate_async(wish)\nprint((first.frames == second.frames).all())",
    "generator.close()\nprint('closed')",
)


@pytest.mark.timeout(120)
def test_a_notebook_generates_in_turn_and_awaits() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    NotebookClient(notebook, timeout=90).execute()
    printed = ["".join(output.text for output in cell.outputs if output.name == "stdout") for cell in notebook.cells]
    assert printed[1:] == ["(1, 128, 128, 3) 5\n", "True\n", "closed\n"]
