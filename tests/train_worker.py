"""Trains a tiny random model, for test_train.py: alone, under torchrun, or as a server that forks ready processes.

usage: train_worker.py OUT METHOD ROWS.json SETTINGS.json MODEL_DIR [--resume] [--die STEP [RANK]] [--stop-by NAME STEP]
                       [--double] [--method METHOD]
       train_worker.py --held MODEL_DIR
       train_worker.py --serve

--die: killed before that step; of several ranks only RANK, and only until the first restart. --stop-by: the process
sends itself this signal in the middle of that step. --double: in float64. --tried: after a pass for its memory, as on a
GPU. --bf16: the model in bf16. --method: instead of METHOD. Exit codes are those of mralign.py.
--held: shards the model and says how many numbers its layers had, how many this rank holds, and what the head is.
--serve: reads a line {"argv", "world", "log"}, prints the process ids, reads a line, prints the exit codes, -N for
signal N. Its processes have imported everything already, which is most of what a short run takes.
"""

import functools
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from common import endings, training  # noqa: E402
from common.ranks import process_group  # noqa: E402


def interrupt(step: int, number: int) -> None:
    """Send this process `number` in that step: after z0, before the gradients."""
    backward, seen = train.Trainer.backward, []

    @functools.wraps(backward)
    def interrupted(self, *args):
        if len(seen) == step:
            os.kill(os.getpid(), number)
        seen.append(step)
        return backward(self, *args)

    train.Trainer.backward = interrupted


def die(fatal: int, victim: str) -> None:
    """Kill this process before step `fatal`, if it is rank `victim` ("": whichever it is) and not a restarted one."""
    step = train.Trainer.step

    def dying_step(self, number, *args):
        if number == fatal and not self.ranks.restarted and victim in ("", str(self.ranks.rank)):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number, *args)

    train.Trainer.step = dying_step


def held(base: str) -> int:
    with process_group() as ranks:
        m = model.load(base).requires_grad_(False)
        before = sum(p.numel() for p in m.model.layers.parameters())
        training.shard(m, lora.add(m, 2, 4.0), ranks)
        own = sum(p.to_local().numel() for n, p in m.model.layers.named_parameters() if "lora_" not in n)
        os.write(2, f"held {before} {own} {type(m.head).__name__}\n".encode())
    return 0


def main(argv: list[str]) -> int:
    if argv[0] == "--held":
        return held(argv[1])
    out, method, rows, settings, base = argv[:5]
    options = argv[5:]
    if "--die" in options:
        fatal, *victim = options[options.index("--die") + 1 :]
        die(int(fatal), victim[0] if victim else "")
    if "--stop-by" in options:
        name, step = options[options.index("--stop-by") + 1 :][:2]
        interrupt(int(step), signal.Signals[name])
    loaded = [
        data.Row(r["id"], r["chosen"], r["prompt_ids"], r["completion_ids"], torch.tensor(r["w"]))
        for r in json.loads(Path(rows).read_text())
    ]
    torch.set_num_threads(1)
    dtype = torch.float32
    if "--double" in options:
        dtype = torch.float64
        torch.set_default_dtype(dtype)  # of adapters and sums
    if "--bf16" in options:
        dtype = torch.bfloat16
    if "--tried" in options:
        train.Trainer.measure = lambda self: self.try_pass([0, 1])
    if "--method" in options:
        method = options[options.index("--method") + 1]
    try:
        with process_group(timeout_minutes=10) as ranks, ranks.stop.listen():
            train.train(
                model.load(base, dtype).requires_grad_(False),
                loaded,
                method,
                train.TrainSettings(**json.loads(Path(settings).read_text())),
                ranks,
                Path(out),
                "torch",
                "tiny",
                {"rows": "r", "model": "m"},
                "--resume" in options,
            )
    except endings.ENDINGS as error:
        code, reason = endings.ending(error)
        print(f"ended: {code} {reason}", file=sys.stderr, flush=True)
        return code
    return 0


def fork(argv: list[str], rank: int, world: int, port: int, log: str) -> int:
    """Start one rank; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    while line := sys.stdin.readline():
        job = json.loads(line)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        world = job["world"]
        pids = [fork(job["argv"], rank, world, port, job["log"]) for rank in range(world)]
        print(json.dumps(pids), flush=True)
        sys.stdin.readline()  # until then an ended process keeps its id
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        import torch._dynamo  # noqa: F401  the optimizer and DDP import it at their first use
        import torch.distributed.fsdp  # noqa: F401

        serve()
    else:
        sys.exit(main(sys.argv[1:]))
