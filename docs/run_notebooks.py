"""Run the notebooks of docs/notebooks and keep what they say.

python docs/run_notebooks.py [NAME ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent / "notebooks"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb")))


def run(name: str) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; it writes its files into a folder that is gone afterwards."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as place:  # with the kernel's sockets too: no port is opened
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{place}/kernel")
        options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
        NotebookClient(notebook, km=kernel, resources={"metadata": {"path": place}}, **options).execute()
    for cell in notebook.cells:  # standard error is about whoever ran it: progress bars, widgets that are missing
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}  # without the versions of whoever ran it
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=NAMES)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    for name in options.names:
        nbformat.write(run(name), options.out / f"{name}.ipynb")
        print(name)


if __name__ == "__main__":
    main()
