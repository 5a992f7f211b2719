#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, for the tests. As root:
#   tests/slurm/cluster.sh install          Debian's packages
#   tests/slurm/cluster.sh start FOLDER [accounting]
#                                           munged, slurmctld, two slurmd, with accounting slurmdbd and a MariaDB; all that
#                                           is theirs lies in FOLDER
#   tests/slurm/cluster.sh stop FOLDER      ends them, and every job
# Clients find it by a link, /etc/slurm/slurm.conf; where a file is there already, nothing is started. Nodes claim more
# CPUs and memory than there are, and two GPUs each that do not exist.
set -euo pipefail

install() {
    command -v slurmctld slurmd slurmdbd munged sbatch mariadbd > /dev/null && return
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends slurmctld slurmd slurmdbd slurm-client munge mariadb-server
}

port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

configure() {
    local host
    host=$(hostname -s)
    cat > "$1/slurm.conf" << CONF
ClusterName=oppu
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$(port)
SlurmctldPidFile=$1/slurmctld.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdPidFile=$1/%n/slurmd.pid
SlurmdLogFile=$1/%n/slurmd.log
SlurmdSpoolDir=$1/%n
StateSaveLocation=$1/state
AuthType=auth/munge
AuthInfo=socket=$1/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
# Memory is watched, and a job above what it asked for is ended.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
$2
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(port) CPUs=8 RealMemory=500000 Gres=gpu:2
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(port) CPUs=8 RealMemory=500000 Gres=gpu:2
PartitionName=small Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=gpus Nodes=n1,n2 MaxTime=INFINITE State=UP
CONF
    printf 'Name=gpu File=%s\n' /dev/null /dev/zero > "$1/gres.conf"  # any two devices
}

# Without accounting none of sacct, sacctmgr and sshare works.
NO_ACCOUNTING=AccountingStorageType=accounting_storage/none

accounting() {
    local database daemon password
    database=$(port)
    daemon=$(port)
    password=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
    mariadb-install-db --no-defaults --user=root --datadir="$1/db" --skip-test-db > "$1/mariadb.log"
    mariadbd --no-defaults --user=root --datadir="$1/db" --bind-address=127.0.0.1 --port="$database" \
        --socket="$1/db.socket" --pid-file="$1/mariadb.pid" --skip-log-bin >> "$1/mariadb.log" 2>&1 &
    for _ in $(seq 100); do
        mariadb --no-defaults --socket="$1/db.socket" 2>> "$1/mariadb.log" << SQL && break
CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '$password'; GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';
SQL
        sleep 0.2
    done
    (umask 077 && cat > "$1/slurmdbd.conf") << CONF
AuthType=auth/munge
AuthInfo=socket=$1/munge.socket
DbdHost=localhost
DbdPort=$daemon
SlurmUser=root
PidFile=$1/slurmdbd.pid
LogFile=$1/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$database
StorageUser=slurm
StoragePass=$password
CONF
    slurmdbd
    for _ in $(seq 100); do
        (echo > "/dev/tcp/127.0.0.1/$daemon") 2> /dev/null && break
        sleep 0.2
    done
    printf '%s\n' AccountingStorageType=accounting_storage/slurmdbd AccountingStorageHost=127.0.0.1 \
        "AccountingStoragePort=$daemon" "AccountingStoragePass=$1/munge.socket"
}

LINK=/etc/slurm/slurm.conf # Snakemake's plugin takes SLURM_CONF out of the environment of jobs

start() {
    if [ -e $LINK ] && { ! [ -L $LINK ] || scontrol ping > /dev/null 2>&1; }; then
        echo "$LINK is there: this machine has a Slurm of its own" >&2
        exit 3
    fi
    export SLURM_CONF=$1/slurm.conf
    mkdir -p "$1"/{state,n1,n2} "$(dirname $LINK)"
    (umask 077 && head -c 1024 /dev/urandom > "$1/munge.key")
    munged --force --socket="$1/munge.socket" --key-file="$1/munge.key" --pid-file="$1/munge.pid" \
        --log-file="$1/munge.log" --seed-file="$1/munge.seed" --num-threads=2
    configure "$1" "$(if [ "${2-}" = accounting ]; then accounting "$1"; else echo $NO_ACCOUNTING; fi)"
    ln -sfn "$1/slurm.conf" $LINK
    slurmctld
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 100); do
        [ "$(timeout 5 sinfo --noheader --Node --partition=small --states=idle 2> /dev/null | wc -l)" = 2 ] && return
        sleep 0.2
    done
    sinfo --Node --long >&2 || true
    tail -n 20 "$1"/*.log "$1"/*/*.log >&2
    return 1
}

stop() {
    export SLURM_CONF=$1/slurm.conf
    scancel --user=root 2> /dev/null || true
    sleep 1
    for daemon in n1/slurmd n2/slurmd slurmctld slurmdbd mariadb munge; do
        [ -f "$1/$daemon.pid" ] && kill "$(cat "$1/$daemon.pid")" 2> /dev/null || true
    done
    [ "$(readlink $LINK)" = "$1/slurm.conf" ] && rm $LINK
}

case ${1-} in
    install) install ;;
    start) start "$(realpath "$2")" "${3-}" ;;
    stop) stop "$(realpath "$2")" ;;
    *) sed -n '2,9s/^# //p' "$0"; exit 2 ;;
esac
