#!/bin/bash
# A small grid through a real single-node SLURM, which this script starts and stops, and the same grid on this machine: the numbers must be equal.
# Before it, one run in two tasks of a job, and the same run in one process: the losses must agree to rounding.
# Not part of `make test`. Needs root, Debian's slurm-wlm and munge, and snakemake-executor-plugin-slurm in the virtual environment:
#   apt-get install slurm-wlm munge && .venv/bin/pip install 'snakemake-executor-plugin-slurm>=2,<3' && tests/slurm/run.sh
set -euo pipefail
repo=$(cd "$(dirname "$0")/../.." && pwd)
bin=${BIN:-$repo/.venv/bin}
for tool in munged slurmctld slurmd sbatch "$bin/snakemake"; do
    command -v "$tool" >/dev/null || { echo "$tool is missing, see the head of this script"; exit 2; }
done
"$bin/python" -c 'import snakemake_executor_plugin_slurm' 2>/dev/null || { echo 'snakemake-executor-plugin-slurm is missing, see the head of this script'; exit 2; }
[ "$(id -u)" = 0 ] || { echo 'slurmd starts jobs as root only'; exit 2; }
[ ! -e /etc/slurm/slurm.conf ] || { echo 'this machine has a SLURM of its own (/etc/slurm/slurm.conf)'; exit 2; }

scratch=$(mktemp -d); pids=()
stop() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait
    [ "$(readlink /etc/slurm/slurm.conf)" = "$scratch/slurm.conf" ] && rm -f /etc/slurm/slurm.conf
    if [ "${1:-0}" = 0 ]; then rm -rf "$scratch"; else echo "kept for a look: $scratch"; fi
}
trap 'stop $?' EXIT
mkdir -p "$scratch"/{state,spool,log,munge,here,slurm}
chmod 755 "$scratch"

# ---- the cluster: everything in one folder, but for a link in /etc/slurm: what runs inside a job looks for its configuration there
host=$(hostname -s)
dd if=/dev/urandom of="$scratch/munge/key" bs=1024 count=1 2>/dev/null; chmod 400 "$scratch/munge/key"
munged --foreground --force --key-file="$scratch/munge/key" --socket="$scratch/munge/socket" --pid-file="$scratch/munge/pid" --seed-file="$scratch/munge/seed" \
    --log-file="$scratch/log/munged.log" >"$scratch/log/munged.out" 2>&1 & pids+=($!)
cat > "$scratch/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$scratch/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$scratch/state
SlurmdSpoolDir=$scratch/spool
SlurmctldLogFile=$scratch/log/slurmctld.log
SlurmdLogFile=$scratch/log/slurmd.log
SlurmctldPidFile=$scratch/slurmctld.pid
SlurmdPidFile=$scratch/slurmd.pid
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MinJobAge=3600
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) CoresPerSocket=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2/1024*.9)}' /proc/meminfo) State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
ln -s "$scratch/slurm.conf" /etc/slurm/slurm.conf
for _ in $(seq 50); do [ -S "$scratch/munge/socket" ] && break; sleep .2; done
slurmctld -D -f "$scratch/slurm.conf" >"$scratch/log/ctld.out" 2>&1 & pids+=($!)
slurmd -D -f "$scratch/slurm.conf" >"$scratch/log/d.out" 2>&1 & pids+=($!)
for _ in $(seq 100); do [ "$(sinfo -h -o %t 2>/dev/null)" = idle ] && break; sleep .3; done
[ "$(sinfo -h -o %t)" = idle ] || { echo 'the node did not come up'; tail -n 5 "$scratch"/log/*; exit 1; }
sinfo

# ---- a run in two tasks
run() {   # tag, then the command that starts it
    local tag=$1; shift
    (cd "$scratch" && BDAM_ROOT=$scratch OMP_NUM_THREADS=1 "$@" "$bin/python" -m bdam_repro.shell -p preset smoke -p epochs 1 -p device cpu -p amp off -p tag "$tag")
}
echo 'one process'; run one env
echo 'two tasks'; run two srun --ntasks=2 --cpus-per-task=1 --kill-on-bad-exit=1
"$bin/python" - "$scratch/runs/synth/smoke" <<'PY'
import sys
import pandas as pd
one, two = (pd.read_csv(f'{sys.argv[1]}/full-{tag}/seed0/history.csv').filter(regex='^loss_|^w_|^lr') for tag in ('one', 'two'))
worst = (one - two).abs().max().max()
assert 0 < worst < 1e-4, worst
print(f'losses, task weights and learning rate of two tasks and of one process differ by {worst:.0e} at most')
PY

# ---- the same grid twice
export PYTHONWARNINGS=ignore
grid() {   # folder, then options of snakemake
    local folder=$scratch/$1; shift
    (cd "$folder" && BDAM_ROOT=$folder "$bin/snakemake" --snakefile "$repo/workflow/Snakefile" --quiet rules "$@" \
        --config preset=smoke layouts=false 'seeds=[0,1]' 'variants=[baseline,full]' -- tables/synth-smoke/runs.csv tables/synth-smoke/table3.csv)
}
echo 'here'; grid here --profile "$repo/workflow/profiles/local"
echo 'through SLURM'; grid slurm --profile "$repo/workflow/profiles/slurm" --latency-wait 10 --slurm-no-account --slurm-status-command squeue \
    --slurm-init-seconds-before-status-checks 5 --default-resources mem_mb=1500 runtime=30
jobs=$(squeue -h -t all -o %i | wc -l)
echo "SLURM ran $jobs jobs"
[ "$jobs" -ge 6 ]          # styles, four trainings, a table

"$bin/python" - "$scratch" <<'PY'
import sys
from bdam_repro.results import KEY, METRICS, read_runs
here, slurm = (read_runs(f'{sys.argv[1]}/{x}/tables/synth-smoke/runs.csv')[[*KEY, *METRICS, 'val_R1', 'epoch', 'config_hash']] for x in ('here', 'slurm'))
assert here.equals(slurm), here.compare(slurm)
assert open(f'{sys.argv[1]}/here/tables/synth-smoke/table3.csv').read() == open(f'{sys.argv[1]}/slurm/tables/synth-smoke/table3.csv').read()
print(f'{len(here)} rows of runs.csv and table 3 are the same')
PY
