"""Compiled programs, kept on disk between processes."""

import pathlib
import platform

import jax

from moejax.data import cache


def keep_programs() -> None:
    """Lets jax keep compiled programs in the cache folder, so that resuming or evaluating a run starts at once.

    A folder a processor: a program compiled for one may not run on another that shares the home folder.
    """
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        cpuinfo = pathlib.Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
        folder = f"xla-{cache.digest([platform.machine(), *features])}"
        jax.config.update("jax_compilation_cache_dir", str(cache.folder() / folder))
