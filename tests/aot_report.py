"""Prints, as JSON, what ahead-of-time compilation says of the kernels and their launches.

test_kernels_aot.py runs it in a process of its own, since its own process interprets the kernels.
"""

import dataclasses
import json
import os
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from repo_ops.kernels import aot
from repo_ops.kernels.aot_cases import cases
from repo_ops.kernels.binaries import TARGETS, specialization
from repo_ops.kernels.clipped_ratio import ratio_launch
from repo_ops.kernels.group_advantages import advantages_launch
from repo_ops.kernels.logit_rows import RowStats, grads_launch, row_stats, stats_launch
from repo_ops.kernels.tiled_logps import tiled_launches

# The largest of each kernel, which spill first: every case on every architecture is for `repo-ops kernels --check`.
LARGEST = "(stats|grads) float32 .*everything|odd to bfloat16|bounds|sequence|prefix|split|join"
FEW = "^(?!tiled_logps)|tiled_logps bfloat16 everything"


def jit_key(launch):
    """What Triton's launcher would look this launch up by, tensors in memory included."""
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialization, _ = binder(**launch.arguments)
    return repr(specialization)


def row_launches(V, rows, skip, temperature, softcap):
    """Both row kernels on slices that start `skip` elements into their buffers, as a loop over chunks makes them."""
    tile = torch.empty(rows, V)
    vector = torch.empty(rows + skip)[skip:]
    ids = torch.zeros(rows + skip, dtype=torch.int64)[skip:]
    options = {"inv_temperature": 1 / temperature, "softcap": softcap, "architecture": "sm_90"}
    stats, _ = stats_launch(tile, ids, with_entropy=True, **options)
    given = RowStats(vector, vector, vector, vector)
    return [stats, grads_launch(tile, ids, given, vector, vector, **options)[0]]


def tiled_keys(rows, D, V, temperature, skip):
    """Both kernels of a head on slices that start `skip` rows into their buffers."""
    hidden, weight = (torch.empty(n + skip, D, dtype=torch.bfloat16)[skip:] for n in (rows, V))
    ids = torch.zeros(rows + skip, dtype=torch.int64)[skip:]
    options = {"inv_temperature": 1 / temperature, "logit_scale": temperature, "softcap": temperature}
    launches, _ = tiled_launches(hidden, weight, ids, with_entropy=True, architecture="sm_90", **options)
    return [jit_key(one) for one in launches]


def keys():
    """Each list holds the keys of launches that must share one binary."""
    aligned = [(152064, 2, 0, 0.7, 30.0), (151936, 3, 1, 1.0, 50.0), (4, 1, 2, 2.0, 1.0)]
    odd = [(50257, 3, 0, 0.7, 30.0), (151665, 2, 1, 1.0, 50.0), (129, 16, 3, 2.0, 1.0)]
    found = {}
    for name, shapes in (("aligned rows", aligned), ("odd rows", odd)):
        both = [row_launches(*shape) for shape in shapes]
        found[f"{name}, statistics"] = [jit_key(stats) for stats, _ in both]
        found[f"{name}, gradients"] = [jit_key(grads) for _, grads in both]
    heads = [tiled_keys(*shape) for shape in ((3, 128, 300, 1.0, 1), (17, 4096, 151936, 0.7, 2), (1, 64, 1, 2.0, 3))]
    for i, name in enumerate(("product", "join")):
        found[f"tiled_logps, {name}"] = [both[i] for both in heads]
    tokens = []
    for level in ("token", "sequence", "prefix"):
        same = []
        for N, skip, low, beta, delta in ((1, 0, 0.8, 0.0, 3.0), (16, 1, 0.9, 0.04, 4.0), (4097, 3, 1.0, 1.0, 1.0)):
            token = torch.empty(N + skip)[skip:]
            launch, _ = ratio_launch(
                token, token, old_logps=token, ref_logps=token, weights=token, low=low, high=2 - low, beta=beta,
                delta=delta, level=level, cu_seqlens=torch.empty(N + 1, dtype=torch.int32), architecture="sm_90",
            )  # fmt: skip
            same.append(jit_key(launch))
        found[f"clipped_ratio {level}"] = same
        tokens += same[:1]
    found["group_advantages"] = [
        jit_key(advantages_launch(torch.empty(B), torch.empty(2, dtype=torch.int64), eps=eps, architecture="sm_90")[0])
        for B, eps in ((1, 1e-4), (16, 1e-6), (4097, 0.0))
    ]
    found["different levels (must differ)"] = tokens
    return found


def scalar_comparisons():
    """Kinds of comparison between two scalars of the plain statistics kernel: "oge" is >=, "ogt" >."""
    launch = next(case.launch for case in cases("sm_90") if case.name == "row_stats float32 aligned")
    source = ASTSource(launch.kernel, *specialization(launch))
    ttir = str(triton.compile(source, target=TARGETS["sm_90"], options=launch.options).asm["ttir"])
    return re.findall(r"arith\.cmpf (\w+), %\w+, %\w+ : f32", ttir)


def refusal():
    """The error of a CPU tensor in a process that compiles its kernels."""
    try:
        row_stats(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    jobs = os.cpu_count() or 1
    rows = aot.inspect_kernels(["sm_90"], match="^(?!tiled_logps)|tiled_logps bfloat16", jobs=jobs)
    rows += aot.inspect_kernels(["gfx942"], match=FEW, jobs=jobs)
    rows += aot.inspect_kernels(["sm_80", "sm_100", "sm_120"], match=LARGEST, jobs=jobs)
    disassembled = aot.inspect_kernels(["sm_90"], match="grads float32 aligned to bfloat16", sass=True)
    report = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "disassembled": dataclasses.asdict(disassembled[0]),
        "faults": aot.faults(rows, aot.read_kept(aot.KEPT)),
        "keys": keys(),
        "scalar_comparisons": scalar_comparisons(),
        "refusal": refusal(),
    }
    print(json.dumps(report))
