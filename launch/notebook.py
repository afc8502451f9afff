"""What a notebook does before it trains: installs what is missing, and finds a folder for its run.

Only Python's own library is imported here, since nothing else may be installed yet.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

MOUNT = Path("/content/drive")  # where Colab's own examples mount Google Drive
# Colab's image brings them. JAX loads every plugin it finds, and these belong to another JAX.
OTHER_CUDA = ("jax-cuda12-plugin", "jax-cuda12-pjrt")


def is_on_colab() -> bool:
    """Whether the kernel is Colab's, which imports `google.colab` when it starts."""
    return "google.colab" in sys.modules


def accelerator(devices: Path = Path("/dev")) -> str:
    """The extra of pyproject.toml that this machine's accelerator needs: "tpu", "gpu", or "" where
    there is only the CPU. JAX cannot be asked, because it may not be installed yet.
    """
    if (devices / "accel0").exists() or (devices / "vfio" / "0").exists():
        return "tpu"
    return "gpu" if (devices / "nvidiactl").exists() else ""


def install(extra: str) -> None:
    """Installs the checkout in the current folder with an extra, in the versions of
    constraints.txt: always on Colab, elsewhere only where the packages are missing.

    Raises:
      SystemExit: the kernel has already loaded another NumPy than the one that is now installed.
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
    """The folder of a notebook's run, which is printed. It is $ESPALIER_NOTEBOOK_WORKDIR if that is
    set, else runs/NAME of the checkout. `on_drive` mounts Google Drive, where the run outlives the
    session, and takes espalier/NAME of My Drive instead.

    Raises:
      SystemExit: `on_drive` where there is no Colab, or beside $ESPALIER_NOTEBOOK_WORKDIR.
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
                "DRIVE = True needs Colab, which alone mounts Google Drive; set DRIVE = False."
            ) from None
        drive.mount(str(mount))
        found = mount / "MyDrive" / "espalier" / name
    print(f"The run is kept in {found}")
    return found
