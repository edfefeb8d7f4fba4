"""A runner whose kernels are compiled ahead, in a process that has launched none; prints how many and the texts' hash.

Run by a test, with an empty cache of compiled kernels.
"""

from __future__ import annotations

import torch
from fakes_gpu import Engine, Parts, config, cuda_runner, plain_runner

from vserve.engine.cuda_runner import CudaRunner
from vserve.engine.request import GenRequest, RequestId, SamplingParams
from vserve.engine.scheduler import Limits

SIZES = {"num_blocks": 128, "block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128}


def main() -> None:
    parts = Parts(config(layers=3, heads=8, kv_heads=2, width=64), torch.device("cuda"), torch.float32, 0.06)
    wanted = [GenRequest(RequestId(i), [i + 1, 5, 7], 6, SamplingParams(temperature=0.0)) for i in range(5)]
    compiled = 0

    def make(limits: Limits) -> CudaRunner:
        nonlocal compiled
        runner = cuda_runner(parts)(limits)
        compiled = runner.compile([runner.buckets.choose(8, 0, 8), runner.buckets.choose(0, 1, 16)], 4)
        return runner

    mine = Engine(make, **SIZES).run(wanted)
    theirs = Engine(plain_runner(parts), 1, **SIZES).run(wanted)
    print(compiled, mine == theirs)


if __name__ == "__main__":
    main()
