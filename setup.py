"""Maps the source folders to one installed package: repo_ops, and .kernels, .trainer, .benchmarks within it.

Everything else about the distribution stands in pyproject.toml. The mapping cannot stand there: a wheel must never
hold a top-level `kernels`, since that is the name of another project's package, which it would overwrite.
"""

import gzip
import os
import tarfile

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

FOLDERS = {
    "repo_ops": "repo_ops",
    "repo_ops.kernels": "kernels",
    "repo_ops.trainer": "trainer",
    "repo_ops.benchmarks": "benchmarks",
}

packages = [
    name
    for package, folder in FOLDERS.items()
    for name in (package, *(f"{package}.{inner}" for inner in find_packages(folder)))
]


class Sdist(sdist):
    """Writes the same bytes from the same files where SOURCE_DATE_EPOCH is set, as wheels are already written."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = int(epoch)
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        path = f"{base_name}.tar.gz"
        with gzip.GzipFile(path, "wb", mtime=int(epoch)) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(base_dir, filter=plain)
        return path


setup(
    packages=packages,
    package_dir=FOLDERS,
    package_data={"repo_ops": ["py.typed"], "repo_ops.trainer": ["*.yaml", "**/*.yaml"]},
    include_package_data=False,  # MANIFEST.in speaks of the source distribution alone
    cmdclass={"sdist": Sdist},
)
