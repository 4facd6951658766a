"""The process of its own in which compare.py measures the memory of one method; no command for people."""

import json
import sys

from repo_ops.benchmarks.compare import memory_of

if __name__ == "__main__":
    print(json.dumps(memory_of(json.loads(sys.argv[-1]))))
