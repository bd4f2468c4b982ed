#!/usr/bin/env bash
# Fresh Debian 12 (root, no systemd needed) -> running local Slurm with N emulated nodes.
# Idempotent: returns at once when the cluster is already up.  Stop it with down.sh.
set -euo pipefail
DIR=${SLURM_CI_DIR:-${TMPDIR:-/tmp}/slurm-ci}       # state, logs, pid files
NODES=${SLURM_CI_NODES:-2}               # emulated nodes n1..nN, one slurmd each
CPUS=${SLURM_CI_CPUS:-64}                # advertised, not real (SlurmdParameters=config_overrides)
MEM=${SLURM_CI_MEM_MB:-1000000}          # advertised
GPUS=${SLURM_CI_GPUS:-8}                 # advertised
PORT=${SLURM_CI_PORT:-17000}             # slurmctld; node i listens on PORT+i
CRED=${SLURM_CI_CRED_EXPIRE:-5}          # s; also the wait before a requeued job restarts (default 120)
HERE=$(hostname -s)
die() { echo "slurm up: $*" >&2; tail -n 20 "$DIR"/log/*.log >&2 2>/dev/null || true; exit 1; }
alive() { local f; for f in "$DIR"/run/slurmctld.pid $(seq -f "$DIR/run/slurmd-n%g.pid" "$NODES"); do
    [ -s "$f" ] && grep -qs slurm "/proc/$(cat "$f")/cmdline" || return 1; done; }   # empty for a zombie
# sinfo alone is not enough: it calls a dead slurmd idle until SlurmdTimeout (300 s) has passed
ready() { alive && [ "$(timeout 3 sinfo -h -N -t idle,mix,alloc -p debug -o %N 2>/dev/null | sort -u | wc -l)" = "$NODES" ]; }

[ "$(id -u)" = 0 ] || die "needs root"
if ready; then echo "slurm: already up"; exit 0; fi

# 1. packages -------------------------------------------------------------------------------
missing=
for x in slurmctld slurmd sbatch munged; do command -v $x >/dev/null || missing=1; done
if [ -n "$missing" ]; then               # 8 small packages; the slurm-wlm metapackage pulls 43
    export DEBIAN_FRONTEND=noninteractive
    get() { apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-unsafe-io \
        -o Dpkg::Options::=--path-exclude='/usr/share/man/*' slurmctld slurmd slurm-client munge; }
    get >/dev/null 2>&1 || { apt-get update -qq && get >/dev/null; } || die "apt-get failed"
fi

# 2. a clean slate (anything half-up goes first) ----------------------------------------------
mkdir -p "$DIR/run"
SLURM_CI_DIR=$DIR "$(dirname "$(readlink -f "$0")")/down.sh"
rm -rf "$DIR/state" "$DIR/spool"
mkdir -p "$DIR"/{state,run,log}
for ((i = 1; i <= NODES; i++)); do mkdir -p "$DIR/spool/n$i"; done
: >"$DIR/log/slurmctld.log"

# 3. munge: refuses root, an insecure /run/munge, and a key others can read ---------------------
if ! munge -n >/dev/null 2>&1; then
    install -d -o munge -g munge -m 0755 /run/munge
    install -d -o munge -g munge -m 0700 /var/log/munge /etc/munge
    install -d -o munge -g munge -m 0711 /var/lib/munge
    [ -s /etc/munge/munge.key ] || (umask 077; head -c 128 /dev/urandom >/etc/munge/munge.key)
    chown munge:munge /etc/munge/munge.key; chmod 0400 /etc/munge/munge.key
    runuser -u munge -- /usr/sbin/munged --force
    touch "$DIR/run/munged.ours"
    for ((i = 0; i < 100; i++)); do munge -n >/dev/null 2>&1 && break; sleep 0.05; done
    munge -n >/dev/null 2>&1 || die "munged did not answer"
fi

# 4. configuration ------------------------------------------------------------------------------
if [ -e /etc/slurm/slurm.conf ] && ! grep -q '^# written by up.sh' /etc/slurm/slurm.conf; then
    die "/etc/slurm/slurm.conf is not ours; refusing to overwrite it"
fi
mkdir -p /etc/slurm
cat >/etc/slurm/slurm.conf <<CONF
# written by up.sh
ClusterName=ci
SlurmctldHost=$HERE(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=$CRED
MailProg=/bin/true
MpiDefault=none
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MinJobAge=3600
CompleteWait=0
GresTypes=gpu
NodeName=n[1-$NODES] NodeHostname=$HERE NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + NODES))] CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=60
PartitionName=first Nodes=n1 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
CONF
# Pretend GPUs: Count without File is refused (0 < N), and each File must be a device node.
: >/etc/slurm/gres.conf
if [ "$GPUS" -gt 0 ]; then
    mkdir -p "$DIR/dev"
    for ((i = 0; i < GPUS; i++)); do ln -sf /dev/null "$DIR/dev/gpu$i"; done
    echo "NodeName=n[1-$NODES] Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" >/etc/slurm/gres.conf
fi
touch "$DIR/run/wrote.conf"
{ echo "127.0.0.1 localhost $HERE"; for ((i = 1; i <= NODES; i++)); do echo "127.0.0.$((10 + i)) n$i"; done; } >"$DIR/hosts"

# 5. daemons ------------------------------------------------------------------------------------
slurmctld
for ((i = 1; i <= NODES; i++)); do
    # A private mount+UTS namespace gives each slurmd its own hostname and a hosts file in which
    # the node names resolve, so MASTER_ADDR=n1 works as on a real cluster, /etc/hosts untouched.
    if unshare --mount --uts true 2>/dev/null; then
        unshare --mount --uts -- bash -c 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -N "$2"' _ "$DIR/hosts" "n$i"
    else                                     # unprivileged container: fall back to /etc/hosts
        getent hosts "n$i" >/dev/null || echo "127.0.0.$((10 + i)) n$i # up.sh" >>/etc/hosts
        slurmd -N "n$i"
    fi
done
end=$((SECONDS + 10)); until ready || [ $SECONDS -ge $end ]; do sleep 0.05; done
ready || die "nodes did not become ready: $(sinfo 2>&1)"
echo "slurm: up ($(slurmctld -V), nodes n1..n$NODES)"
