"""Wheels for a machine with PyTorch and without a network: `python bench/wheels.py FOLDER`.

Downloads what an image with torch, transformers, peft, accelerate and pytest usually lacks, for
another Python than this one, and prints the size. `gpu_proof.py --wheels FOLDER` imports them from
there.
"""

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

ROOT = Path(__file__).parents[1]
NEEDED = (
    "diffusers", "importlib-metadata",
    "zarr", "numcodecs", "google-crc32c", "donfig",
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection",
    "ftfy", "wcwidth", "platformdirs", "tomli-w", "beartype",
)  # fmt: skip
"""Packages of wanlora and of its GPU tests, with what they need."""
VIDEO = "av"
"""PyAV: more than all of them together. Without it, clips are .npz files."""
PLATFORMS = ("2_28", "2_27", "2_17", "2_5")


class WheelError(Exception):
    """A folder of wheels cannot be used; the message has the reason."""


def download_command(folder: Path, python: str, *, video: bool) -> list[str]:
    """Command of pip for Linux on x86-64, with the tested versions."""
    names = [*NEEDED, *([VIDEO] if video else [])]
    platforms = [word for p in PLATFORMS for word in ("--platform", f"manylinux_{p}_x86_64")]
    return [
        sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--no-deps",
        "--python-version", python, "--implementation", "cp", *platforms,
        "--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64",
        "--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), *names,
    ]  # fmt: skip


def unpack(folder: Path, site: Path) -> list[str]:
    """Unpack every wheel of a folder so that `site` can be put on the path of Python.

    Args:
        folder: Folder with wheels.
        site: Empty folder.

    Returns:
        Names and versions.

    Raises:
        WheelError: There are no wheels, one is damaged or not for this Python, or two are of the
            same package.
    """
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if not wheels:
        raise WheelError(
            f"{folder}: no wheels there; download them with: python bench/wheels.py {folder}"
        )
    tags, found = set(sys_tags()), {}
    for wheel in wheels:
        try:
            name, version, _, supported = parse_wheel_filename(wheel.name)
        except InvalidWheelFilename as error:
            raise WheelError(f"{wheel}: not the name of a wheel: {error}") from None
        if tags.isdisjoint(supported):
            running = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise WheelError(
                f"{wheel}: not for Python {running} on this machine; download it with: "
                f"python bench/wheels.py {folder} --python {running}"
            )
        if name in found:
            raise WheelError(f"{folder}: two wheels of {name}, {found[name]} and {version}")
        found[name] = version
        _unzip(wheel, site)
    return [f"{name} {version}" for name, version in found.items()]


def _unzip(wheel: Path, site: Path) -> None:
    """Unpack one wheel; files of its `.data/purelib` and `platlib` belong into the same folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                inner = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", entry.filename)
                path = PurePosixPath(inner)
                if path.is_absolute() or ".." in path.parts:
                    raise WheelError(f"{wheel}: it has a file outside of its folder, {inner}")
                if not entry.is_dir():
                    target = site / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(entry))
    except zipfile.BadZipFile as error:
        raise WheelError(f"{wheel}: {error}; download it again") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to put the wheels")
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--video", action="store_true", help="PyAV too: clips from videos")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    command = download_command(options.folder, options.python, video=options.video)
    if code := subprocess.run(command).returncode:  # noqa: PLW1510
        sys.exit(code)
    sizes = [wheel.stat().st_size for wheel in options.folder.glob("*.whl")]
    print(f"{len(sizes)} wheels, {sum(sizes) / 1e6:.1f} MB, in {options.folder}")


if __name__ == "__main__":
    main()
