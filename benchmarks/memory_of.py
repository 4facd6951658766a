"""The process of its own in which compare.py measures the memory of one method; no command for people."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import repo_ops

if find_spec("repo_ops.benchmarks") is None:  # an install that does not map this folder
    repo_ops.__path__.append(str(Path(__file__).resolve().parents[1]))

from repo_ops.benchmarks.compare import memory_of

if __name__ == "__main__":
    print(json.dumps(memory_of(json.loads(sys.argv[-1]))))
