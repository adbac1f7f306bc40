#!/bin/bash
# A Slurm of one node with a fake GPU, from Debian's packages slurm-wlm and munge, as root: slurm.sh start|stop FOLDER
# Keys, sockets and states are in FOLDER; /etc/slurm/slurm.conf leads there, since steps of jobs look for it
set -eu
command=$1
folder=$2
export SLURM_CONF=$folder/slurm.conf
host=$(hostname -s)

controller() { slurmctld -f "$folder/slurm.conf"; }
node() { slurmd -f "$folder/slurm.conf"; }

write_configuration() {
    cat > "$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job starts after cred_expire seconds (120 by default)
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
SlurmdSpoolDir=$folder/spool
StateSaveLocation=$folder/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobs.txt
MinJobAge=3600
KillWait=5
DefMemPerCPU=500
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 Gres=gpu:fake:1 CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
    echo "Name=gpu Type=fake File=/dev/null" > "$folder/gres.conf"
}

case $command in
start)
    mkdir -p "$folder/spool" "$folder/state" "$folder/log" "$folder/munge"
    chmod 711 "$folder/munge"
    dd if=/dev/urandom bs=1 count=1024 of="$folder/munge/key" 2>/dev/null
    chmod 400 "$folder/munge/key"
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" 2>/dev/null
    write_configuration
    mkdir -p /etc/slurm
    ln -sf "$folder/slurm.conf" /etc/slurm/slurm.conf
    ln -sf "$folder/gres.conf" /etc/slurm/gres.conf
    controller
    node
    for _ in $(seq 80); do
        if sinfo -h -o %T 2>/dev/null | grep -q idle; then exit 0; fi
        sleep .25
    done
    echo "Slurm did not start:"
    tail -n 5 "$folder"/log/*.log
    exit 1 ;;
controller) controller ;;
stop)
    for pid in "$folder/slurmd.pid" "$folder/slurmctld.pid" "$folder/munge/pid"; do
        if [ -f "$pid" ]; then kill "$(cat "$pid")" || true; fi
    done
    rm -f /etc/slurm/slurm.conf /etc/slurm/gres.conf ;;
*) echo "expected start, controller or stop"; exit 2 ;;
esac
