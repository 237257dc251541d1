"""Many processes against one: the same weights and figures, one output, and an end for all when one fails."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import disturb
from process_server import CASES
from safetensors.torch import load_file
from test_tasks import write_questions

from slicecli.errors import ProcessError, RequestError
from slicecli.runtime.distributed import ALONE, Processes
from slicecli.runtime.json import read_json
from slicecli.runtime.rendezvous import VARIABLES, started_alone

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


class Server:
    """Starts processes by `process_server`."""

    def __init__(self, folder):
        environment = {name: value for name, value in os.environ.items() if name not in sum(VARIABLES.values(), ())}
        # what torch itself says of a connection that broke off is not what is tested
        environment |= {
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self.folder = folder
        self._number = 0
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("process_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __call__(self, count, *words, fails=None, **more):
        """Run the command line, or a `function`, in `count` processes.

        Returns:
            Exit codes, seconds from the first end to the last, and what each wrote on standard output and error.
        """
        self._number += 1
        files = self.folder / f"run{self._number}"
        wish = {"count": count, "words": [str(word) for word in words], "port": free_port(), "fails": fails, **more}
        wish |= {"files": str(files), "folder": str(self.folder)}
        self._server.stdin.write(json.dumps(wish) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        written = {
            name: [Path(f"{files}.{rank}.{name}").read_text(encoding="utf-8") for rank in range(count)]
            for name in ("out", "err")
        }
        return answer | written

    def close(self):
        self._server.stdin.close()
        self._server.wait(timeout=60)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def in_memory(start):
    """What the cases give in one, two and three processes, by number of processes and rank."""
    for count in (1, 2, 3):
        done = start(count, start.folder, function="cases")
        assert done["codes"] == [0] * count, done["err"]
    return {
        (count, rank): torch.load(start.folder / f"{count}-{rank}.pt") for count in (1, 2, 3) for rank in range(count)
    }


@pytest.fixture(scope="module")
def slice_options(text_file):
    # batches that three processes share unevenly
    return ["--calibration", text_file, "--samples", "22", "--seq-len", "32", "--batch-size", "4", "--no-cache"]


@pytest.fixture(scope="module")
def slices(start, checkpoints, slice_options):
    """The same slice by one, two and three processes."""
    done = {}
    for count in (1, 2, 3):
        words = ["slice", checkpoints(), "--dim", "36", *slice_options, "-o", f"by{count}/slice", "--format", "json"]
        done[count] = start(count, *words)
        assert done[count]["codes"] == [0] * count, done[count]["err"]
    return done


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    norms = [
        (float((found[name] - expected[name]).double().norm()), float(expected[name].double().norm()))
        for name in expected
    ]
    return max(difference / norm if norm else difference for difference, norm in norms)


def assert_close(found, expected, tolerance):
    """Compare plain data: numbers within a tolerance, everything else equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name], tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-9)
    else:
        assert found == expected


def only_errors(done):
    return [line for text in done["err"] for line in text.splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 23, 128])
@pytest.mark.parametrize("batch", [1, 4, 200])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_whole_batches_in_order_and_cover_all_rows(rows, batch, count):
    shares = [Processes(rank, count).share(rows, batch) for rank in range(count)]
    batches = [list(range(rows)[share.rows][i : i + batch]) for share in shares for i in range(0, rows, batch)]
    assert [one for one in batches if one] == [list(range(rows))[i : i + batch] for i in range(0, rows, batch)]
    sizes = [-(-len(range(rows)[share.rows]) // batch) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert [share.processes.is_idle for share in shares] == [size == 0 for size in sizes]
    assert not shares[0].processes.is_idle


def test_equal_neighbours_are_dealt_to_one_process():
    groups = ["a", "a", "b", "c", "c", "c", "a", "d"]
    hands = [Processes(rank, 3).deal(groups) for rank in range(3)]
    assert hands == [[0, 1, 6], [2, 7], [3, 4, 5]]
    assert ALONE.deal(groups) == list(range(8))


@pytest.fixture
def launched(monkeypatch):
    """Return a function that sets the environment of a launcher."""
    monkeypatch.setattr("slicecli.runtime.distributed._here.found", None)
    for variable in (*sum(VARIABLES.values(), ()), "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(variable, raising=False)

    def launch(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ALONE),
        ({**MEETING, "RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ALONE),
        (
            {**MEETING, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            Processes(3, 4, 1, 2),
        ),
        ({**MEETING, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Processes(1, 2, 1, 2)),
    ],
)
def test_processes_are_found_by_what_launchers_say(launched, variables, expected):
    launched(**variables)
    assert Processes.find() == expected


@pytest.mark.parametrize("variables", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_an_environment_without_sense_is_refused(launched, variables):
    launched(**MEETING, **variables)
    with pytest.raises(RequestError):
        Processes.find()


def test_one_process_where_accelerate_was_asked_for_several_is_noticed(launched):
    assert not started_alone()
    launched(**MEETING, ACCELERATE_USE_CPU="True")
    assert started_alone()
    launched(RANK="0", WORLD_SIZE="2")
    assert not started_alone()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(("rank", "absent"), [(0, "process 1, process 2"), (1, "the main process")])
@pytest.mark.parametrize("address", ["127.0.0.1", "nowhere.invalid"])
def test_a_process_that_nobody_joins_says_what_it_waits_for_and_stops(launched, monkeypatch, rank, absent, address):
    monkeypatch.setattr("slicecli.runtime.rendezvous.NOTICE", 0.1)
    monkeypatch.setattr("slicecli.runtime.rendezvous.MEETING", 0.6)
    monkeypatch.setattr("slicecli.runtime.distributed._here.store", None)
    launched(MASTER_ADDR=address, MASTER_PORT=str(free_port()), RANK=str(rank), WORLD_SIZE="3")
    said = []
    with pytest.raises(ProcessError) as stopped:
        Processes.find().join(said.append)
    assert len(said) == 1
    for text in (said[0], stopped.value.cause):
        assert f"process {rank} of 3 according to RANK and WORLD_SIZE" in text
        assert absent in text
    assert "unset RANK and WORLD_SIZE" in stopped.value.remedy


@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_with_left_over_variables_is_not_silent(tmp_path, rank):
    code = (
        "from slicecli.runtime import rendezvous; rendezvous.NOTICE, rendezvous.MEETING = 0.1, 0.6\n"
        "from slicecli.cli import main; main()"
    )
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": str(rank), "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, "slice", "./model", "--dim", "36"],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    notice, error = done.stderr.splitlines()
    assert notice.startswith(f"This is process {rank} of 2")
    assert error.startswith(f"Error: This is process {rank} of 2")


def test_many_processes_do_not_share_one_device(launched):
    from slicecli.runtime.placement import pick_device

    launched(**MEETING, RANK="0", WORLD_SIZE="2")
    with pytest.raises(RequestError, match="Several processes cannot"):
        pick_device("cuda:0")
    assert pick_device("cpu") == torch.device("cpu")


def test_a_process_alone_imports_nothing():
    code = (
        "import sys; from slicecli.runtime.distributed import Processes as P; P.find(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_is_exchanged_arrives(start):
    done = start(3, function="exchanges")
    assert done["codes"] == [0, 0, 0], done["err"]
    found = [json.loads(text) for text in done["out"]]
    assert found[0] == found[1] == found[2]
    one = found[0]
    assert one["gathered"] == ["", "x", "xx"]
    assert one["from_main"] == {"rank": 0}
    assert one["everywhere"] == [6.0, 6.0, 6.0]
    assert one["square_is_right"]
    assert one["only_main"] == [1.0, 1.0]
    assert one["given"] == [0.0, 1.0, 2.0]
    assert "Process 2 has a different colour" in one["refused"]
    assert one["was_first"] == [True, False, False]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_weights_and_spectra_are_those_of_one_process(in_memory, case, count):
    found, expected = in_memory[count, 0][case], in_memory[1, 0][case]
    assert largest_difference(found, expected) < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_processes_never_diverge(in_memory, case):
    main, other = in_memory[2, 0][case], in_memory[2, 1][case]
    assert not [name for name in main.keys() - other.keys() if ".layers." in name or "embed" in name]
    assert all(torch.equal(main[name], other[name]) for name in other)


@pytest.mark.parametrize("count", [2, 3])
def test_the_slice_is_that_of_one_process(start, slices, count):
    folders = [start.folder / f"by{number}" / "slice" for number in (count, 1)]
    files = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert files[0] == files[1]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert largest_difference(*weights) < 1e-6
    records = [read_json(folder / "slicecli.json") for folder in folders]
    assert_close(*({**record, "weights": list(record["weights"])} for record in records), 1e-9)
    assert [path.name for path in folders[0].parent.iterdir()] == ["slice"]


def test_widths_are_chosen_as_by_one_process(start, checkpoints, slice_options):
    words = ["slice", checkpoints(), "--target-params", "66k", *slice_options, "--format", "json"]
    plans = []
    for count in (1, 2):
        done = start(count, *words, "-o", f"target{count}/slice")
        assert done["codes"] == [0] * count, done["err"]
        plan = read_json(start.folder / f"target{count}" / "slice" / "slicecli.json")
        plans.append((plan["dim"], plan["mlp_dim"]))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("count", [2, 3])
def test_the_main_process_alone_speaks(slices, count):
    reports = [json.loads(slices[number]["out"][0]) for number in (count, 1)]
    for report in reports:
        for name in ("output", "seconds", "phases", "peak_memory_bytes"):
            report.pop(name)
        report["placement"].pop("budget_bytes")
        report["placement"].pop("needed_bytes")  # of one process
    assert_close(*reports, 1e-9)
    assert slices[count]["out"][1:] == [""] * (count - 1)
    assert slices[count]["err"][1:] == [""] * (count - 1)
    progress = [re.findall(r"^refit .*", slices[number]["err"][0], flags=re.MULTILINE) for number in (count, 1)]
    assert progress[0] == progress[1]
    assert len(progress[0]) == 4


def test_figures_are_those_of_one_process(start, slices, text_file, checkpoints):
    questions = write_questions(start.folder / "mine.jsonl")
    words = ["--perplexity", text_file, "--seq-len", "32", "--batch-size", "4", "--tasks", questions, "--limit", "19"]
    found = {}
    for count in (1, 3):
        done = start(
            count, "eval", f"by{count}/slice", *words, "--baseline", checkpoints(), "--record", "--format", "json"
        )
        assert done["codes"] == [0] * count, done["err"]
        assert done["out"][1:] == done["err"][1:] == [""] * (count - 1)
        found[count] = json.loads(done["out"][0])
        results = read_json(start.folder / f"by{count}" / "slice" / "slicecli.json")["results"]
        assert results["tasks"]["mine.jsonl"]["samples"] == 19
    assert_close(found[3], found[1], 1e-7)  # float32 weights may differ in their last bit


@pytest.mark.parametrize(("mode", "tolerance"), [("full", 1e-5), ("blocks", 0.02)])
def test_a_training_is_that_of_one_process(start, slices, text_file, checkpoints, mode, tolerance):
    words = ["--data", text_file, "--tokens", "2k", "--seq-len", "32", "--batch-size", "256", "--lr", "2e-3"]
    folder, found = f"disturbed-{mode}", {}
    disturb(Path(shutil.copytree(start.folder / "by1" / "slice", start.folder / folder)), only="layers")
    for count in (1, 2):
        output = f"{mode}{count}"
        words_of_mode = ["--mode", mode, "-o", output, "--format", "json"]
        done = start(count, "recover", folder, "--teacher", checkpoints(), *words, *words_of_mode)
        assert done["codes"] == [0] * count, done["err"]
        assert done["out"][1:] == done["err"][1:] == [""] * (count - 1)
        found[count] = json.loads(done["out"][0])
        assert not list(start.folder.glob(f".{output}*"))
    assert found[2]["kl_before"] == pytest.approx(found[1]["kl_before"], rel=1e-5)
    assert found[2]["kl_after"] == pytest.approx(found[1]["kl_after"], rel=tolerance)


def test_a_sweep_is_that_of_one_process(start, checkpoints, text_file, slice_options):
    words = ["--dims", "40,32", "--perplexity", text_file, "--limit", "11", *slice_options]
    for count in (1, 2):
        done = start(count, "sweep", checkpoints(), *words, "-o", f"sweep{count}")
        assert done["codes"] == [0] * count, done["err"]
        assert done["out"][1:] == [""] * (count - 1)
        assert sorted(path.name for path in (start.folder / f"sweep{count}").iterdir()) == ["curve.png", "results.json"]
    found, expected = (read_json(start.folder / f"sweep{count}" / "results.json") for count in (2, 1))
    assert_close(found["points"], expected["points"], 1e-6)
    assert_close(found, expected, 1e-3)  # the spread of a curve through points that nearly lie on it tells little


def test_statistics_come_from_the_cache_for_all(start, checkpoints, slice_options):
    words = ["slice", checkpoints(), *slice_options[:-1], "--cache-dir", "cache", "--format", "json"]
    for dim, expected in ((36, "collected"), (32, "cache")):
        done = start(2, *words, "--dim", dim, "-o", f"cached{dim}")
        assert done["codes"] == [0, 0], done["err"]
        assert json.loads(done["out"][0])["statistics"] == expected


def test_processes_without_rows_are_named(start, checkpoints, slice_options):
    words = [*slice_options, "--batch-size", "16"]
    done = start(3, "slice", checkpoints(), "--dim", "36", *words, "-o", "idle")
    assert done["codes"] == [0, 0, 0], done["err"]
    assert "22 rows in batches of 16 keep only 2 of 3 processes busy; use --batch-size 7" in done["err"][0]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["slice", "MODEL", "--dim", "0"], 2, "A dim of 0"),
        (["slice", "MODEL", "--dim", "36", "--nonsense"], 2, "--nonsense"),
        (["slice", "MODEL", "--dim", "36", "--resume"], 2, "Leave out --resume"),
        (["slice", "MODEL", "--dim", "36", "-o", "cases.txt"], 1, "cases.txt"),
        (["eval", "./missing"], 1, "./missing"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_a_refusal_is_said_once(start, checkpoints, words, code, sentence):
    (start.folder / "cases.txt").touch()
    words = [checkpoints() if word == "MODEL" else word for word in words]
    done = start(2, *words)
    assert done["codes"][0] == code
    assert done["codes"][1] or words == ["nonsense"]
    (error,) = only_errors(done)
    assert sentence in error
    assert done["err"][1] == ""
    assert done["out"] == ["", ""]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["sentence", "bug", "SIGKILL", "SIGTERM", "SIGINT"])
def test_a_process_that_fails_ends_all(start, checkpoints, slice_options, rank, how):
    done = start(3, "slice", checkpoints(), "--dim", "36", *slice_options, "-o", "failed/slice", fails=[rank, how])
    assert all(done["codes"])
    assert done["seconds"] < 15
    killed_main = rank == 0 and how == "SIGKILL"
    left = list((start.folder / "failed").iterdir()) if (start.folder / "failed").exists() else []
    assert [path.name for path in left] == ([".slice.incomplete"] if killed_main else [])
    errors = only_errors(done)
    if how == "sentence":
        assert errors == ["Error: NaN was found here. Mend it."]
    elif how == "bug":
        assert sum("no sentence" in text and "Traceback" in text for text in done["err"]) == 1
        assert errors == (["Error: Process 1 of 3 failed: TypeError: no sentence. Its own output shows where."] * rank)
    elif how == "SIGKILL" and rank:
        assert len(errors) == 1
        assert "without reporting an error" in errors[0]
    else:
        assert errors == []


@pytest.mark.parametrize("failing", [0, 3])
def test_all_hear_of_a_failure_before_anybody_ends(start, failing):
    done = start(6, failing, function="waits")
    assert done["codes"] == [0] * 6, done["err"]
    found = [json.loads(text) for text in done["out"]]
    assert [one["heard"] for rank, one in enumerate(found) if rank != failing] == ["NaN was found here. Mend it."] * 5
    assert max(one["seconds"] for one in found) < 2.5  # all are still there then


def test_what_is_not_shared_is_done_by_the_main_process(start, checkpoints):
    done = start(2, "estimate", checkpoints(), "--dim", "36")
    assert done["codes"] == [0, 0]
    assert "36" in done["out"][0]
    assert done["out"][1] == done["err"][1] == ""


def test_the_commands_on_the_page_run_as_written(tmp_path):
    """By the launchers themselves, in a folder that looks like a clone after the demo."""
    from slicecli.data.demo import MODEL_FOLDER

    (tmp_path / "slicecli" / "data" / "demo").mkdir(parents=True)
    (tmp_path / "slicecli" / "data" / "demo" / "model").symlink_to(MODEL_FOLDER)
    page = (ROOT / "docs" / "processes.md").read_text()
    blocks = re.findall(r"```\n(.*?)```", page, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if "slicecli/data/demo/model" in line]
    assert [shlex.split(command)[0] for command in commands] == ["accelerate", "torchrun"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "SLICECLI_CACHE": str(tmp_path / "cache")}
    for command in commands:
        # less text, which changes nothing but the time
        quick = command.replace("--samples 64", "--samples 4").replace("--limit 64", "--limit 4")
        done = subprocess.run(quick, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert read_json(tmp_path / "by-two" / "slicecli.json")["dim"] == 72
    assert json.loads(done.stdout)["perplexity"]["demo"]["tokens"] == 4 * 255
