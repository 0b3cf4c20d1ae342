"""The places of compiled kernels: they are kept in the user's cache directory, so that the next start finds them again.

By themselves Triton keeps them in ~/.triton, FlashInfer in ~/.cache, wherever XDG_CACHE_HOME is, and the CuTe DSL in the
directory for temporary files, which a restart may empty. numba keeps its own beside our source, where they may stay.
"""

import logging
import os
from collections.abc import MutableMapping
from pathlib import Path

logger = logging.getLogger(__name__)

_FOLDERS = {
    "TRITON_CACHE_DIR": "triton",
    "CUTE_DSL_CACHE_DIR": "cute_dsl",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}
"""The folder of our cache directory for each library, by the environment variable that it reads."""


def keep_kernels(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have the libraries keep what they compile in XDG_CACHE_HOME/sparkmoe, or ~/.cache/sparkmoe.

    To be called in a process before it imports them. What the environment sets already stays as it is. A directory that
    cannot be written is logged, and nothing is set.
    """
    try:
        folder = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparkmoe"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.warning("compiled kernels may not be found again (%s); set XDG_CACHE_HOME", error)
        return
    for name, own in _FOLDERS.items():
        if (
            name != "TRITON_CACHE_DIR" or "TRITON_HOME" not in environment
        ):  # which sets the same, one folder higher
            environment.setdefault(name, str(folder / own))
