"""Starts many processes that do one job together, without importing anything twice.

A program: it reads one JSON object a line, forks as many processes as that asks for, each with the environment that a
launcher would give it, and answers with their exit codes and the seconds from the first end to the last. A process runs
the command line, or a function of this module; what it writes goes into a file of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

LENGTH = 24
CASES = {
    # family, method, calibration rows, rows of a batch, dim, MLP channels
    "llama, batches that do not divide": ("llama", "refit", 23, 4),
    "llama, fewer than five rows": ("llama", "refit", 3, 1),
    "llama, fewer rows than processes": ("llama", "refit", 1, 1),
    "llama, fewer channels": ("llama", "refit", 14, 4, 48, 61),
    "phi, fewer channels": ("phi", "refit", 14, 4, 48, 61),
    "mixtral": ("mixtral", "refit", 14, 4),
    "qwen2_moe, fewer channels": ("qwen2_moe", "refit", 14, 4, 48, 32),
    "phi, by LayerNorm": ("phi", "refit", 14, 4),
    "llama, as published": ("llama", "pca", 14, 4),
    "mixtral, as published at random": ("mixtral", "random", 14, 4),
}


def slice_case(family, method, rows, batch, dim=48, mlp_dim=None):
    """Slice a random model in float64; return what the sink took, and the energies."""
    from slicecli.adapters import select_adapter
    from slicecli.checkpoint.configs import custom_code_config, stock_config
    from slicecli.checkpoint.meta_model import build_runnable_meta_model
    from slicecli.family.dimensions import Dimensions
    from slicecli.family.plugins import plugins
    from slicecli.family.schedule import Schedule
    from slicecli.progress import Silent
    from slicecli.proof.declaration import ModelWeights
    from slicecli.proof.float64 import Float64Throughout
    from slicecli.proof.tiny import random_model, tiny_config
    from slicecli.runtime.distributed import Processes
    from slicecli.slicing.context import DenseModel, Target
    from slicecli.slicing.fisher import collect_fisher
    from slicecli.slicing.reductions import share_rows
    from slicecli.slicing.refit import collect_statistics, refit
    from slicecli.slicing.slicegpt import slice_published

    model = random_model(tiny_config(family), 0).double()
    fields = model.config.to_dict()
    dimensions = Dimensions(select_adapter(fields, plugins().adapters), fields)
    token_ids = torch.randint(0, 300, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    weights = ModelWeights(model)
    dense = DenseModel(build_runnable_meta_model(model.config), weights, dimensions, torch.device("cpu"), torch.float64)
    dense, batches = share_rows(Processes.find(), dense, token_ids, batch)
    found = {}

    def target(config):
        return Target(dim, build_runnable_meta_model(config), torch.float64, found.__setitem__, mlp_dim=mlp_dim)

    with Float64Throughout():
        if method == "refit":
            statistics = collect_statistics(dense, batches, Silent(), with_channels=mlp_dim is not None)
            basis = statistics.basis
            refit(
                dense, statistics, [target(stock_config(model.config, dimensions, dim, "float64"))], batches, Silent()
            )
            fisher = collect_fisher(dense, basis, batches, 0, Silent())
            about = {"energies": basis.energies, "shared": fisher.shared, "layer": fisher.layer}
            if statistics.channel_losses is not None:
                about["channel_losses"] = statistics.channel_losses
            about["nll"] = torch.tensor(fisher.nll, dtype=torch.float64)
        else:
            schedule = Schedule.constant(dimensions, dim)
            config = custom_code_config(model.config, dimensions, schedule, True, 0, "float64")
            about = {"shares": slice_published(dense, target(config), schedule, method, 1, batches, Silent()).shares}
    return {**{name: value.detach().double() for name, value in found.items()}, **about}


def cases(folder):
    """Do all cases and leave what they give in a file for each process."""
    from slicecli.runtime.distributed import Processes

    found = {name: slice_case(*case) for name, case in CASES.items()}
    processes = Processes.find()
    torch.save(found, Path(folder) / f"{processes.count}-{processes.rank}.pt")


def exchanges():
    """Print, as JSON, what comes of every kind of exchange."""
    from slicecli.errors import RequestError
    from slicecli.runtime.distributed import Processes

    processes = Processes.find()
    order = []
    with processes.main_of_machine_first():
        order.append(time.monotonic())
        time.sleep(0.05 if processes.local_rank == 0 else 0)
        order.append(time.monotonic())
    everywhere = torch.full((3,), float(processes.rank + 1), dtype=torch.float64)
    processes.sum_everywhere(everywhere)
    generator = torch.Generator().manual_seed(processes.rank)
    half = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    square, expected = half @ half.T, half @ half.T
    processes.sum_square_to_main(square)
    processes.sum_everywhere(expected)
    idle = processes.share(1, 1).processes
    only_main = torch.ones(2, dtype=torch.float64)
    idle.sum_everywhere(only_main)
    (given,) = processes.tensors_from_main(lambda: [torch.arange(3.0)], [(3,)], torch.device("cpu"))
    try:
        processes.require_same({"colour": "green" if processes.rank < 2 else "red"})
        refused = ""
    except RequestError as error:
        refused = str(error)
    processes.require_same({"colour": "green"})
    orders = processes.gather(order)
    found = {
        "gathered": processes.gather("x" * processes.rank),
        "from_main": processes.from_main(lambda: {"rank": processes.rank}),
        "everywhere": everywhere.tolist(),
        "square_is_right": processes.rank > 0 or bool(torch.allclose(square, expected, rtol=1e-12)),
        "only_main": only_main.tolist(),
        "given": given.tolist(),
        "refused": refused,
        "was_first": [begin < orders[0][1] for begin, _ in orders],
    }
    print(json.dumps(found))


def waits(failing):
    """Print what a process hears, and after how long, that waits for one which fails but does not end yet."""
    from slicecli.errors import ProcessError, WeightsError
    from slicecli.runtime.distributed import Processes

    processes = Processes.find()
    processes.barrier()
    started = time.monotonic()
    try:
        if processes.rank == int(failing):
            raise WeightsError("NaN was found here.", "Mend it.")
        for _ in range(2):
            processes.gather(processes.rank)
        heard = "nothing"
    except WeightsError as error:
        processes.tell(error)
        heard = ""
    except ProcessError as error:
        heard = str(error)
    print(json.dumps({"heard": heard, "seconds": time.monotonic() - started}))
    time.sleep(3)


def fails(how):
    """Let this process fail in the middle of a slice, by a bug at its beginning."""
    from slicecli.errors import WeightsError
    from slicecli.jobs import run as engine
    from slicecli.slicing import sublayer_fit as step

    def read_rows(_job):
        raise TypeError("no sentence")

    if how == "bug":
        engine.read_rows = read_rows
        return
    solve, solved = step.solve_normal_equations, []

    def solve_until_it_fails(*arguments):
        solved.append(None)
        if len(solved) == 3:
            if how == "sentence":
                raise WeightsError("NaN was found here.", "Mend it.")
            os.kill(os.getpid(), getattr(signal, how))
        return solve(*arguments)

    step.solve_normal_equations = solve_until_it_fails


def be(wish, rank):
    """Be one of the processes, and end."""
    for number, name in enumerate(("out", "err"), start=1):
        os.dup2(os.open(f"{wish['files']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": wish["count"], "LOCAL_WORLD_SIZE": wish["count"]}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(wish["port"]))
    os.chdir(wish["folder"])
    code = 1
    try:
        if wish["fails"] and wish["fails"][0] == rank:
            fails(wish["fails"][1])
        if "function" in wish:
            globals()[wish["function"]](*wish["words"])
            code = 0
        else:
            from slicecli.cli import main

            sys.argv = ["slicecli", *wish["words"]]
            main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    # what Python does at its end, but for taking apart the packages, which takes a second
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(wish):
    """Start the processes of a wish; return their exit codes, and the seconds between the first end and the last."""
    ranks = {}
    for rank in range(wish["count"]):
        child = os.fork()
        if child == 0:
            be(wish, rank)
        ranks[child] = rank
    codes, ends = {}, []
    while ranks:
        child, status = os.wait()
        codes[ranks.pop(child)] = os.waitstatus_to_exitcode(status)
        ends.append(time.monotonic())
    return {"codes": [codes[rank] for rank in sorted(codes)], "seconds": ends[-1] - ends[0]}


def serve():
    """Do what is asked for, one after the other."""
    import accelerate  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import slicecli.evaluation.tasks
    import slicecli.slicing.refit  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(start(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
