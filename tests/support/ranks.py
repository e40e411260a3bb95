"""One long-lived pair of processes that run the same job as two ranks.

Started as a program it is one of the ranks: it reads jobs ("module:function arguments-file result-file") line by line,
runs them, and answers each with one line.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1]


class RankPair:
    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._processes = [self._start(rank, port) for rank in range(2)]

    def _start(self, rank: int, port: int) -> subprocess.Popen[str]:
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "tests",  # Lightning then takes the ranks from the environment
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "support.ranks"],
            env=environment,
            cwd=TESTS,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, job: str, scratch: Path, /, **arguments: Any) -> list[Any]:
        """Run "module:function" on both ranks; return what each returned, ordered by rank."""
        inputs = scratch / "arguments.pt"
        torch.save(arguments, inputs)
        results = [scratch / f"result-{rank}.pt" for rank in range(2)]
        for process, result in zip(self._processes, results, strict=True):
            assert process.stdin is not None
            process.stdin.write(f"{job}\t{inputs}\t{result}\n")
            process.stdin.flush()
        for process in self._processes:
            assert process.stdout is not None
            answer = next((line for line in process.stdout if line.startswith("@")), "@ the process ended")
            if answer.strip() != "@done":
                self.close()
                raise RuntimeError(f"{job}: {answer[1:].replace(chr(1), chr(10))}")
        return [torch.load(result, weights_only=False) for result in results]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)


def _serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job, inputs, result = line.rstrip("\n").split("\t")
        module, function = job.split(":")
        try:
            value = getattr(importlib.import_module(module), function)(**torch.load(inputs, weights_only=False))
            torch.save(value, result)
            answer = "@done"
        except BaseException:
            answer = "@" + traceback.format_exc().replace("\n", chr(1))
        print(answer, flush=True)  # noqa: T201 - the answer to the waiting test


if __name__ == "__main__":
    _serve()
