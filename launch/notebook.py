"""What a notebook does before training: it installs missing packages and finds a run folder.

This file imports only the standard library, since nothing else may be installed yet.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

MOUNT = Path("/content/drive")  # as in Colab's own examples
# Colab preinstalls these. JAX loads every plugin that it finds, and they belong to another JAX.
OTHER_CUDA = ("jax-cuda12-plugin", "jax-cuda12-pjrt")


def is_on_colab() -> bool:
    """Whether this is a kernel of Colab, which imports `google.colab` when it starts."""
    return "google.colab" in sys.modules


def accelerator(devices: Path = Path("/dev")) -> str:
    """The extra of pyproject.toml for this machine's accelerator: "tpu", "gpu", or "" if there is
    only a CPU. JAX cannot answer this, because it may not be installed yet.
    """
    if (devices / "accel0").exists() or (devices / "vfio" / "0").exists():
        return "tpu"
    return "gpu" if (devices / "nvidiactl").exists() else ""


def install(extra: str) -> None:
    """Installs the checkout in the current folder with an extra, in the versions of
    constraints.txt: on Colab always, elsewhere only if packages are missing.

    Raises:
      SystemExit: the kernel has already imported another version of NumPy than is now installed.
      CalledProcessError: pip failed.
    """
    if not is_on_colab() and importlib.util.find_spec("grain") is not None:
        return
    pip = [sys.executable, "-m", "pip"]
    if is_on_colab() and extra == "gpu":
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *OTHER_CUDA], check=True)
    project = f".[{extra}]" if extra else "."
    pinned = ["--quiet", "-c", "constraints.txt"]
    subprocess.run([*pip, "install", *pinned, "-e", project], check=True)
    numpy = sys.modules.get("numpy")
    if numpy and numpy.__version__ != importlib.metadata.version("numpy"):
        raise SystemExit("Installed. Now restart the session (menu Runtime), and run all again.")


def workdir(name: str, *, on_drive: bool, mount: Path = MOUNT) -> Path:
    """Prints and returns the folder of a notebook's run: $ESPALIER_NOTEBOOK_WORKDIR if it is set,
    else runs/NAME of the checkout. `on_drive` mounts Google Drive, where the run outlives the
    session, and returns espalier/NAME of My Drive instead.

    Raises:
      SystemExit: `on_drive` outside Colab, or together with $ESPALIER_NOTEBOOK_WORKDIR.
    """
    given = os.environ.get("ESPALIER_NOTEBOOK_WORKDIR", "")
    found = Path(given) if given else Path("runs", name)
    if on_drive:
        if given:
            raise SystemExit(
                f"DRIVE = True and ESPALIER_NOTEBOOK_WORKDIR={given} name two folders; "
                "set DRIVE = False, or unset the variable."
            )
        try:
            from google.colab import drive  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SystemExit(
                "DRIVE = True works only on Colab, which mounts Google Drive; set DRIVE = False."
            ) from None
        drive.mount(str(mount))
        found = mount / "MyDrive" / "espalier" / name
    print(f"The run is kept in {found}")
    return found
