"""Two tasks of a real SLURM are one run: a cluster of one node, private to this test, in a temporary folder.

Part of `make soak`. Needs root and Debian's packages: apt-get install slurm-wlm munge. The whole grid through
SLURM is another script, tests/slurm/run.sh."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from test_training import FILES

from bdam_repro.config import ROOT
from bdam_repro.files import read_tensors
from bdam_repro.launch import free_port

TOOLS = 'munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'sinfo', 'scancel', 'scontrol'
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
pytestmark = [
    pytest.mark.soak, pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f'no {", ".join(MISSING)}: apt-get install slurm-wlm munge'),
    pytest.mark.skipif(os.geteuid() != 0, reason='slurmd starts jobs as root only')]

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
KillWait=60
InactiveLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 CoresPerSocket=4 RealMemory={memory} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def wait_until(what, seconds: float, holds):
    "Wait until `holds()`; a busy machine is slow, so the limit is far away."
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f'no {what} within {seconds} s'
        time.sleep(.2)


class Cluster:
    "One node whose daemons are children of this process, and its commands."
    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, []
        for name in ('munge', 'state', 'spool'): (folder/name).mkdir(parents=True)
        folder.chmod(0o755)
        memory = os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')*8//10//2**20
        conf = CONF.format(host=socket.gethostname().split('.')[0], folder=folder, memory=memory,
                           ports=[free_port(), free_port()])
        (folder/'slurm.conf').write_text(conf)
        (folder/'munge'/'key').write_bytes(os.urandom(1024))
        (folder/'munge'/'key').chmod(0o400)
        strange = [k for k in os.environ if k.startswith(('SLURM_', 'SBATCH_', 'SRUN_'))]
        self.env = {k: v for k, v in os.environ.items() if k not in strange}
        self.env |= dict(SLURM_CONF=str(folder/'slurm.conf'), PYTHON=sys.executable, OMP_NUM_THREADS='1',
                         PYTHONPATH=str(ROOT), BDAM_ROOT=str(folder/'home'))

    def daemon(self, *command) -> None:
        out = (self.folder/f'{command[0]}.out').open('w')
        self.daemons.append(subprocess.Popen([*map(str, command)], env=self.env, stdout=out, stderr=out))

    def run(self, *command) -> str:
        done = subprocess.run([*map(str, command)], env=self.env, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def state(self) -> str:
        "Of the node; '' while the controller does not answer."
        ask = ['sinfo', '-h', '-o', '%t']
        return subprocess.run(ask, env=self.env, capture_output=True, text=True).stdout.strip()

    def __enter__(self) -> 'Cluster':
        munge, conf = self.folder/'munge', self.folder/'slurm.conf'
        try:
            self.daemon('munged', '--foreground', '--force', f'--key-file={munge}/key',
                        f'--socket={munge}/socket', f'--pid-file={munge}/pid', f'--seed-file={munge}/seed',
                        f'--log-file={munge}/log')
            wait_until('socket of munge', 60, (munge/'socket').exists)
            self.daemon('slurmctld', '-D', '-f', conf)
            self.daemon('slurmd', '-D', '-f', conf)
            wait_until('idle node', 120, lambda: self.state() == 'idle')
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for p in reversed(self.daemons): p.terminate()
        for p in self.daemons:
            try: p.wait(20)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp('cluster')) as cluster: yield cluster


def submit(cluster, *options, **run) -> str:
    "Submit the repository's own script with options of SLURM and of a run; the number of its job."
    given = dict(preset='smoke', epochs=1, device='cpu', amp='off', runs=cluster.folder/'runs') | run
    words = [word for name, value in given.items() for word in ('-p', name, value)]
    return cluster.run('sbatch', '--parsable', '--gpus-per-node=0', '--cpus-per-task=1', '--mem=0',
                       f'--output={cluster.folder}/%j.out', *options, ROOT/'workflow'/'train.sbatch', *words)

def job(cluster, number: str, field: str) -> str:
    "A field of SLURM's record of a job."
    words = cluster.run('scontrol', 'show', 'job', number).split()
    return next(word.split('=', 1)[1] for word in words if word.startswith(f'{field}='))

def ended(cluster, number: str) -> str:
    "Wait for a job; its last state."
    wait_until('end of the job', 900, lambda: job(cluster, number, 'JobState') not in
               ('PENDING', 'CONFIGURING', 'RUNNING', 'COMPLETING'))
    return job(cluster, number, 'JobState')

def said(cluster, number: str) -> str: return (cluster.folder/f'{number}.out').read_text()

def numbers(folder: Path) -> pd.DataFrame:
    "Losses, task weights and learning rate, by epoch."
    return pd.read_csv(folder/'history.csv').filter(regex='^loss_|^w_|^lr')

def folder_of(cluster, tag: str) -> Path:
    return cluster.folder/'runs'/'synth'/'smoke'/f'full-{tag}'/'seed0'


def test_two_tasks_are_one_run(cluster):
    one = submit(cluster, '--ntasks-per-node=1', tag='one')
    assert ended(cluster, one) == 'COMPLETED', said(cluster, one)
    two = submit(cluster, tag='two')
    assert ended(cluster, two) == 'COMPLETED', said(cluster, two)
    assert job(cluster, two, 'NumTasks') == '2'
    a, b = (folder_of(cluster, tag) for tag in ('one', 'two'))
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir()) == FILES
    worst = (numbers(a) - numbers(b)).abs().max().max()
    assert 0 < worst < 1e-4                          # float32 sums in another order: not one task twice


def test_a_job_that_is_stopped_saves_and_the_next_goes_on(cluster):
    "SIGTERM, as SLURM sends it before the time is over."
    options = dict(tag='stopped', epochs=200, save_steps=1)
    first, folder = submit(cluster, **options), folder_of(cluster, 'stopped')
    wait_until('checkpoint', 600, (folder/'last.ckpt').exists)
    cluster.run('scancel', f'--signal={signal.SIGTERM.name[3:]}', first)
    assert ended(cluster, first) in ('FAILED', 'CANCELLED', 'COMPLETED'), said(cluster, first)
    step = read_tensors(folder/'last.ckpt')[1]['step']
    assert 0 < step < 200*4 and not (folder/'metrics.json').exists()
    second = submit(cluster, **options | dict(epochs=200))
    wait_until('later step', 600, lambda: read_tensors(folder/'last.ckpt')[1]['step'] > step)
    cluster.run('scancel', second)
    ended(cluster, second)


def test_a_mistake_is_one_line(cluster):
    number = submit(cluster, tao=1)
    assert ended(cluster, number) == 'FAILED'
    assert 'tao' in said(cluster, number) and 'Traceback' not in said(cluster, number)
