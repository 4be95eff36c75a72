"""Two processes on one GPU: what one exports the other opens, copies and gives back."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from services.worker.transfer import publish_shared, receive
from shared.contracts.refs import TensorPlace, TensorRef
from shared.tensors.store import HostTensorStore

pytestmark = [pytest.mark.gpu, pytest.mark.integration]

SHM_DIR = Path("/dev/shm")
ROOT = Path(__file__).resolve().parents[2]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def read_refs(run_id: str) -> None:
    """The other process: a reference per line in, the digest of what it read out."""
    reader = HostTensorStore(SHM_DIR, run_id, "reader")
    for line in sys.stdin:
        ref = TensorRef.model_validate_json(line)
        tensor = asyncio.run(receive(reader, ref, torch.device("cuda", 0)))
        print(digest(tensor), reader.counters.gets, flush=True)
    reader.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_goes_from_process_to_process_on_the_gpu(run_id: str, dtype: torch.dtype) -> None:
    owner = HostTensorStore(SHM_DIR, run_id, "owner")
    command = [sys.executable, "-m", "tests.integration.test_cuda_ipc_gpu", run_id]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        held: list[int] = []
        for number in range(12):
            whole = torch.randn(3, 1560, 1664, device="cuda").to(dtype)
            # A part of a larger storage, and work still under way when it is exported.
            part = (whole * 2)[1:] if number % 2 else whole[1:]
            ref = publish_shared(owner, part, 30.0)
            assert ref.place is TensorPlace.CUDA_IPC
            other.stdin.write(ref.model_dump_json() + "\n")
            other.stdin.flush()
            seen, gets = other.stdout.readline().split()
            assert seen == digest(part)
            assert int(gets) == number + 1, "opened, not fetched"
            del whole, part
            owner.sweep()
            assert owner.leased == 0
            torch.cuda.ipc_collect()
            held.append(torch.cuda.memory_allocated())
        # What was given back is free again: the owner holds no more after twelve than after two.
        assert held[-1] <= held[1]
        never_read = publish_shared(owner, torch.ones(1 << 20, device="cuda"), 0.0)
        owner.sweep()
        torch.cuda.ipc_collect()
        assert torch.cuda.memory_allocated() <= held[-1], "an export that nobody opened is freed too"
        assert not owner.is_leased(never_read)
        other.stdin.close()
        assert other.wait(30) == 0
    owner.close()


if __name__ == "__main__":
    read_refs(sys.argv[1])
