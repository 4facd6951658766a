"""Maps the source folders to one installed package: repo_ops, and .kernels, .trainer, .benchmarks within it.

Everything else about the distribution stands in pyproject.toml. The mapping cannot stand there: a wheel must never
hold a top-level `kernels`, since that is the name of another project's package, which it would overwrite.
"""

from setuptools import find_packages, setup

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

setup(
    packages=packages,
    package_dir=FOLDERS,
    package_data={"repo_ops": ["py.typed"], "repo_ops.trainer": ["*.yaml", "**/*.yaml"]},
)
