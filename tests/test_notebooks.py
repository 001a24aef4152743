"""Each notebook of examples/notebooks/ runs as it stands, on a tiny model in the place of the demo model."""

import json
import shutil

import pytest
from helpers.paths import ROOT

from hf_sparse_attn import demo

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PRINTED = {
    "convert_and_compare": ("expected density 0.", "sparse, not fitted", "sparse, converted"),
    "finetune": ("rows of 1024 tokens", "at last", "after   sparse"),
    "look_at_a_pattern": ("pattern.png: ", "of the softmax mass kept"),
}


@pytest.fixture(autouse=True)
def tiny_demo_model(tiny_model_path, tmp_path, monkeypatch):
    """The cache of the demo model holds the tiny one, for this process and for kernels."""
    directory = shutil.copytree(tiny_model_path, tmp_path / demo.MODEL_NAME)
    config = json.loads((directory / "config.json").read_text())
    del config["sparse_attention"]
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    monkeypatch.setenv(demo.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def check(path, printed):
    assert path.stem in PRINTED
    for words in PRINTED[path.stem]:
        assert words in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells(path, capsys):
    """Without Jupyter."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    names = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, {cell['id']}", "exec"), names)
    figures = plt.get_fignums()
    plt.close("all")
    check(path, capsys.readouterr().out)
    assert figures


@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    """In a kernel, as Jupyter runs it."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    check(path, "".join(output.text for output in outputs if output.output_type == "stream"))
    assert any("image/png" in output.get("data", ()) for output in outputs)
