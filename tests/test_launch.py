"""The files in launch/ work: preflight, the scripts, a real Slurm, and the manifest for Kubernetes."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gen_dist import preflight

LAUNCH = Path(__file__).parents[1] / "launch"
PREFLIGHT = ["-m", "gen_dist.preflight"]
# what an outer torchrun, Slurm or Kubeflow may have set must not reach the tests
OUTSIDE = re.compile("(PET|SLURM|TORCHELASTIC)_|(MASTER|NODE|LOCAL)_|N(NODES|PROC_PER_NODE)$|RANK$|WORLD_SIZE$")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not OUTSIDE.match(name)}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}

TRAIN = """
import sys
import torch
import torch.distributed as dist
import gen_dist as gen

def train():
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    criterion = torch.nn.functional.mse_loss
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.1)
    scheduler = gen.ExactGen(optimizer, model, criterion)
    torch.manual_seed(dist.get_rank())
    for _ in range(3):
        x, y = torch.randn(8, 3), torch.randn(8, 1)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        scheduler.step(x, y)
        optimizer.step()
    sys.stdout.write(f"{sys.argv[1:]}: rank {dist.get_rank()} of {dist.get_world_size()} at {scheduler.last.lr!r}\\n")

dist.init_process_group("gloo")
train()  # a function, so that no DDP outlives the process group, which may abort the process at its end
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small training program, in a folder of its own."""
    file = tmp_path_factory.mktemp("train") / "train.py"
    file.write_text(TRAIN)
    return file


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture(scope="module")
def local(train: Path) -> subprocess.CompletedProcess[str]:
    """The output of launch/local.sh on two ranks: preflight, and then the training."""
    return run("bash", str(LAUNCH / "local.sh"), "train.py", "--name", "a b", cwd=train.parent, NPROC_PER_NODE="2")


def start(*command: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=ENVIRONMENT | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def assert_trained(output: str, ranks: int, arguments: str = "[]") -> None:
    assert f"preflight: ready, {ranks} ranks" in output
    found = re.findall(r"(\[.*\]): rank (\d+) of (\d+) at (\S+)", output)
    assert sorted((said, int(rank), int(size)) for said, rank, size, _ in found) == [
        (arguments, rank, ranks) for rank in range(ranks)
    ], output
    assert len({rate for *_, rate in found}) == 1, "all ranks must have the same rate"


# ------------------------------------------------------------------------------------------------------ preflight


def test_preflight_prints_a_line_a_rank(local: subprocess.CompletedProcess[str]) -> None:
    assert local.returncode == 0, local.stderr
    printed = local.stdout.splitlines()
    title, *rows, verdict = printed[: next(i for i, line in enumerate(printed) if line.startswith("preflight")) + 1]
    assert title.split()[:4] == ["rank", "host", "python", "torch"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    for row in rows:
        assert " gloo " in row
        assert int(row.split()[-4]) > 0, "microseconds of an all-reduce"
    assert verdict == "preflight: ready, 2 ranks"


def test_preflight_tells_of_a_rank_with_other_settings() -> None:
    """Without torchrun, which would end the second rank as soon as the first one fails."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        start(sys.executable, *PREFLIGHT, **common, RANK=str(rank), OMP_NUM_THREADS=str(rank + 1)) for rank in range(2)
    ]
    said = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "preflight: OMP_NUM_THREADS differs: 1 on rank 0; 2 on rank 1" in said[0]
    assert "preflight: FAILED, 2 ranks" in said[0]
    assert said[1] == ""


FOUND: dict[str, tuple[list[dict[str, Any]], str]] = {
    "alike": ([{}, {}], ""),
    "another torch": ([{}, {}, {"torch": "2.6"}], "torch differs: 2.13 on ranks 0-1; 2.6 on rank 2"),
    "no GPU there": ([{}, {"backend": "nccl"}], "backend differs: gloo on rank 0; nccl on rank 1"),
    "another checkout": ([{"gen_dist": "a"}, {}], "gen_dist differs: a on rank 0; 0.1 on rank 1"),
    "set on one": (
        [{}, {"settings": "2", "variables": {"NCCL_ALGO": "Ring"}}, {}],
        "NCCL_ALGO differs: (not set) on ranks 0, 2; Ring on rank 1",
    ),
    "one does not come": ([{}, None, {}], "no word from rank 1"),  # type: ignore[list-item]
    "one cannot reduce": ([{}, {"error": "RuntimeError: no route"}], "rank 1: RuntimeError: no route"),
    "another device": ([{}, {"device": "gpu"}], "note: device differs: cpu on rank 0; gpu on rank 1"),
    "a clock": (
        [{"clock": 0.0}, {"clock": -9.0}],
        "note: the clock differs from rank 0's by more than 1.0 s on rank 1",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_preflight_finds(capsys: pytest.CaptureFixture[str], case: str) -> None:
    here, told = FOUND[case]
    usual = {"host": "h", "python": "3", "torch": "2.13", "gen_dist": "0.1", "device": "cpu", "backend": "gloo"}
    usual |= {"settings": "1", "variables": {}, "free_memory": 0}  # type: ignore[dict-item]
    reports = [r if r is None else preflight.Report(**usual | {"rank": i} | r) for i, r in enumerate(here)]
    ready = preflight.alike(reports) == "alike" and preflight.working(reports) == "ready"
    printed = capsys.readouterr().out
    assert f"preflight: {told}" in printed
    assert ready == (told == "" or told.startswith("note"))
    assert ("FAILED" in printed) == (not ready)


def test_ranks_hear_of_one_that_does_not_come() -> None:
    report = preflight.look_around(0, "")
    meeting = preflight.Meeting(dist.HashStore(), 0, 2, timeout=0.2)
    assert meeting.hold(report, lambda reports: str([r is None for r in reports])) == "[False, True]"


# --------------------------------------------------------------------------------------------------- the scripts


def test_local_checks_and_trains(local: subprocess.CompletedProcess[str]) -> None:
    assert local.returncode == 0, local.stderr
    assert_trained(local.stdout, 2, "['--name', 'a b']")


def test_nothing_is_trained_where_ranks_differ(train: Path) -> None:
    """Two nodes on which different commands were typed."""
    common = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    nodes = []
    for node in range(2):
        nodes.append(start("bash", str(LAUNCH / "multinode.sh"), str(train), str(node), **common, NODE_RANK=str(node)))
        time.sleep(1)  # torchrun numbers machines of one name in the order of its process ids
    said = "".join(node.communicate(timeout=100)[0] for node in nodes)
    assert all(node.returncode != 0 for node in nodes), said
    assert f"--settings differs: {train} 0 on rank 0; {train} 1 on rank 1" in said
    assert "of 2 at" not in said


def test_multinode_takes_its_numbers_from_kubeflow(train: Path) -> None:
    """Two nodes on one machine, with the variables of a Kubeflow TrainJob."""
    common = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}
    common |= {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": str(free_port())}
    nodes = [
        start("bash", str(LAUNCH / "multinode.sh"), str(train), **common, PET_NODE_RANK=str(node)) for node in range(2)
    ]
    said = "".join(node.communicate(timeout=100)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert_trained(said, 2)


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh"])
def test_scripts_say_how_to_call_them(tmp_path: Path, script: str) -> None:
    done = run("bash", str(LAUNCH / script), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bash")


def test_multinode_asks_for_an_address(tmp_path: Path) -> None:
    done = run("bash", str(LAUNCH / "multinode.sh"), "train.py", cwd=tmp_path, NNODES="2", NPROC_PER_NODE="1")
    assert done.returncode == 2
    assert "set MASTER_ADDR" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck(tmp_path: Path) -> None:
    done = run("shellcheck", "local.sh", "multinode.sh", "slurm.sbatch", cwd=LAUNCH)
    assert done.returncode == 0, done.stdout


# ----------------------------------------------------------------------------------------------------------- Slurm

SLURM = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SchedulerType=sched/builtin
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=test Nodes=n1,n2 Default=YES State=UP
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def why_no_slurm() -> str:
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program) is None:
            return f"no {program}: on Debian, install slurm-wlm"
    return "" if os.geteuid() == 0 else "slurmd needs root"


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Slurm cluster of two nodes on one machine, with a key, ports and folders of its own."""
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    config = folder / "slurm.conf"
    ports = [free_port() for _ in range(3)]
    config.write_text(
        SLURM.format(folder=folder, host=socket.gethostname(), ports=ports, user="root", cpus=os.cpu_count())
    )
    environment = ENVIRONMENT | {"SLURM_CONF": str(config)}
    munge = ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket",
             f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log",
             f"--seed-file={folder}/munge.seed"]  # fmt: skip
    with contextlib.ExitStack() as stack, (folder / "output").open("w") as output:

        def daemon(*command: str) -> None:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            stack.callback(process.wait, timeout=20)
            stack.callback(process.terminate)

        daemon(*munge)
        until(lambda: (folder / "munge.socket").exists())
        daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            daemon("slurmd", "-D", "-N", node)
        states = ["sinfo", "--noheader", "--format=%T %D"]
        until(
            lambda: (
                subprocess.run(states, env=environment, capture_output=True, text=True).stdout.split() == ["idle", "2"]
            ),
            told=folder / "output",
        )
        yield environment


def until(true: Any, told: Path | None = None, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, told.read_text() if told else "it took too long"
        time.sleep(0.1)


@pytest.mark.timeout(110)
@pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "can run")
def test_slurm_runs_the_job_on_its_nodes(slurm: dict[str, str], train: Path) -> None:
    def said(*command: str) -> str:
        return subprocess.run(
            command, cwd=train.parent, env=slurm | {"NPROC_PER_NODE": "1"}, capture_output=True, text=True, check=True
        ).stdout

    batch = str(LAUNCH / "slurm.sbatch")
    job = said("sbatch", "--parsable", "--output=job.out", batch, "train.py", "--epochs", "3").strip()
    until(
        lambda: said("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip() in ENDED,
        seconds=80,
    )
    output = (train.parent / "job.out").read_text()
    assert "JobState=COMPLETED" in said("scontrol", "show", "job", job), output
    assert_trained(output, 2, "['--epochs', '3']")


# ------------------------------------------------------------------------------------------------------ Kubernetes

# Of spec, as published in the custom resource definition trainjobs.trainer.kubeflow.org, version v1alpha1
FIELDS: dict[str, Any] = {
    "activeDeadlineSeconds": int,
    "initializer": dict,
    "managedBy": str,
    "runtimePatches": list,
    "runtimeRef": {"apiGroup": str, "kind": str, "name": str},
    "suspend": bool,
    "trainer": {
        "args": [str],
        "command": [str],
        "env": [{"name": str, "value": str, "valueFrom": dict}],
        "image": str,
        "numNodes": int,
        "numProcPerNode": int,
        "resourcesPerNode": {"claims": list, "limits": dict, "requests": dict},
    },
}
SET_BY_THE_TRAINER = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}


@pytest.fixture
def manifest() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((LAUNCH / "k8s" / "trainjob.yaml").read_text())


def fit(value: Any, fields: Any, where: str) -> list[str]:
    """Where a value is not in a published field, or has another type than that field."""
    if isinstance(fields, type):
        return [] if type(value) is fields else [f"{where} is {value!r}, should be of type {fields.__name__}"]
    if isinstance(fields, list):
        return [wrong for i, item in enumerate(value) for wrong in fit(item, fields[0], f"{where}[{i}]")]
    wrong = [f"no field {where}.{name}" for name in value if name not in fields]
    return wrong + [w for name in value if name in fields for w in fit(value[name], fields[name], f"{where}.{name}")]


def test_the_manifest_has_published_fields_alone(manifest: dict[str, Any]) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert fit(manifest["spec"], FIELDS, "spec") == []
    assert manifest["spec"]["runtimeRef"]["name"] == "torch-distributed"
    trainer = manifest["spec"]["trainer"]
    assert not SET_BY_THE_TRAINER & {variable["name"] for variable in trainer["env"]}, "the trainer refuses these"


def test_the_manifest_is_a_trainjob_to_kubeflows_own_models(manifest: dict[str, Any]) -> None:
    reason = "kubeflow-trainer-api is not installed"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)
    job = models.TrainerV1alpha1TrainJob.from_dict(manifest)
    assert job.spec.trainer.num_nodes == manifest["spec"]["trainer"]["numNodes"]
    assert job.to_dict()["spec"] == manifest["spec"], "the model must know every field"


def test_the_manifest_starts_what_is_there(manifest: dict[str, Any]) -> None:
    trainer = manifest["spec"]["trainer"]
    for name in (trainer["command"][1], trainer["args"][0]):
        assert (LAUNCH.parent / name).is_file()
