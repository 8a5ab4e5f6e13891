"""vLLM's worker on a CPU for a model that is compiled once, and loaded from then on.

vLLM 0.32 writes a compiled model to disk and reads it back in 2 s, and on a CPU throws away what it has read: it asks
what torch.compile made for a method that only vLLM's own compiler, for GPUs, has. Here it gets that method. The files
are under our home (`compilations.py`), and are the same for all weights of one architecture. A model that does not
compile, for whatever reason, is run eagerly, by the same worker.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
from vllm.compilation.caching import aot_compile_hash_factors
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.model_executor.custom_op import CustomOp
from vllm.v1.worker.cpu_worker import CPUWorker

from app.engine.compilations import kept, machine

log = logging.getLogger(__name__)

# vLLM loads its own compiler's work in two steps, of which this is the second; torch's is whole after the first.
BundledAOTAutogradSerializableCallable.finalize_loading = lambda _, __: None


class Worker(CPUWorker):  # type: ignore[misc]
    """`compilation_config.cache_dir` says where compilations are kept."""

    def determine_available_memory(self) -> int:
        if not self._compiles():
            return self._measured()
        try:
            with self._compilation():
                return self._measured()
        except Exception as error:
            log.warning("the model is not compiled and runs eagerly: %s", _first_line(error))
            log.debug("why it is not compiled", exc_info=error)
            self._run_eagerly()
        return self._measured()

    def _measured(self) -> int:
        """vLLM measures memory after a first run of the model, which is where it compiles or loads."""
        return int(super().determine_available_memory())

    def _compiles(self) -> bool:
        """Not where several ranks load together: each would wait for locks that the others hold."""
        config = self.compilation_config
        return config.mode != CompilationMode.NONE and bool(config.cache_dir) and self.parallel_config.world_size == 1

    @contextmanager
    def _compilation(self) -> Iterator[None]:
        # Both are in vLLM's key, though nothing that is compiled depends on them.
        any_path = patch.object(self.model_config, "model", "any weights")
        any_store = patch.dict(os.environ, VLLM_ENABLE_RESPONSES_API_STORE="0")
        with any_path, any_store:
            factors = [machine(), *aot_compile_hash_factors(self.vllm_config)]
            key = hashlib.sha256(repr(factors).encode()).hexdigest()[:16]
            with kept(Path(self.compilation_config.cache_dir), key) as folder:
                if not any(folder.iterdir()):
                    log.warning("compiling the model, once for this machine: about a minute")
                with patch.dict(os.environ, VLLM_CACHE_ROOT=str(folder)):
                    yield

    def _run_eagerly(self) -> None:
        """Undo what was prepared for a compiler: parts in plain PyTorch for it to fuse, instead of kernels."""
        self.compilation_config.mode = CompilationMode.NONE
        self.compilation_config.custom_ops = ["all"]
        with set_current_vllm_config(self.vllm_config):
            for part in self.model_runner.get_model().modules():
                if hasattr(part, "do_not_compile"):
                    part.do_not_compile = True
                if isinstance(part, CustomOp):
                    part._forward_method = part.dispatch_forward(compile_native=False)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
