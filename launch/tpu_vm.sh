#!/bin/bash
# Train on a Cloud TPU slice of any size: make it, install tinylm on every host, train, start again when it is taken.
#
#   launch/tpu_vm.sh --name=pod --zone=us-west4-a --type=v5litepod-16 --bucket=gs://BUCKET -- --config=gpt2_124m \
#       --config.data.source='text:gs://BUCKET/text/*.txt'
#
# Where the data comes from and goes to: the bucket. The text is read from it (any data.source works), prepared tokens
# are kept in BUCKET/stores, the run in BUCKET/runs/NAME. The hosts share nothing else, and a slice's disks go with it.
# Secrets: none are copied. The hosts act as the service account of their VMs (--service_account, or the project's
# default one), which needs the role storage.objectUser on the bucket.
#
# Needs the gcloud command, logged in, with a project chosen. --dry_run prints every command and runs none.
# --version=tpu-ubuntu2204-base   image of the hosts (v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e)
# --service_account=EMAIL         which the hosts act as
# --spot                          cheaper, may be taken away: then a new slice is made and the run goes on
# --restarts=20                   how often to start again
# Ctrl-C asks the run to save and stop; the slice stays (and costs) until `launch/tpu_vm.sh --name=... --zone=...
# --delete`. Keep this script running, in tmux for example.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

name='' zone='' type='' bucket='' account='' version=tpu-ubuntu2204-base spot='' dry_run='' delete='' restarts=20
while [ $# -gt 0 ]; do
    case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --service_account=*) account=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --spot) spot=--spot ;;
    --dry_run) dry_run=yes ;;
    --delete) delete=yes ;;
    --) shift && break ;;
    *) echo "error: $1 is not a flag of tpu_vm.sh; flags of tinylm.main come after --." >&2 && exit 2 ;;
    esac
    shift
done
if [ -z "$name" ] || [ -z "$zone" ] || { [ -z "$delete" ] && { [ -z "$type" ] || [ -z "$bucket" ]; }; }; then
    echo "error: --name, --zone, --type and --bucket are required (the first lines of this script show an example)." >&2
    exit 2
fi
case $bucket in
gs://* | '') bucket=${bucket%/} ;;
*) echo "error: --bucket=$bucket must be an address such as gs://NAME." >&2 && exit 2 ;;
esac

run() { # print the command; run it unless --dry_run
    printf '+' >&2 && printf ' %q' "$@" >&2 && echo >&2
    [ -n "$dry_run" ] || "$@"
}
tpu() { # a command of gcloud about this slice
    local verb=$1
    shift
    run gcloud compute tpus tpu-vm "$verb" "$name" --zone="$zone" "$@"
}
on_all_hosts() { tpu ssh --worker=all --command="$1"; }

state() { gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null; }

make_slice() { # make the slice unless it is there and ready, and install the package on every host
    local now=
    [ -n "$dry_run" ] || now=$(state)
    if [ "$now" != READY ]; then
        [ -z "$now" ] || tpu delete --quiet
        tpu create --accelerator-type="$type" --version="$version" ${spot:+"$spot"} \
            ${account:+"--service-account=$account"} || return 1
    fi
    run git archive --format=tar.gz --output="$archive" HEAD &&
        run gcloud compute tpus tpu-vm scp "$archive" "$name:tinylm.tar.gz" --zone="$zone" --worker=all &&
        on_all_hosts "$install"
}

install='mkdir -p tinylm && tar -xzf tinylm.tar.gz -C tinylm && python3 -m venv venv && venv/bin/pip install --quiet -e "tinylm[tpu,gcs,tokens]"'
# Flags of the user come last, so that they win.
set -- "--workdir=$bucket/runs/$name" "--config.data.store_dir=$bucket/stores" "$@"
# The run makes ~/first_step when it has begun to train: a second abort (134) before that is a crash, no lost peer.
train="rm -f ~/first_step; TINYLM_FIRST_STEP_FILE=~/first_step exec ~/venv/bin/python -m tinylm.main$(printf ' %q' "$@")"

if [ -n "$delete" ]; then
    tpu delete --quiet
    exit
fi

archive=$(mktemp) || exit 1
trap 'rm -f "$archive"' EXIT
stopped=
trap 'stopped=yes; on_all_hosts "pkill -TERM -f tinylm.main"' INT TERM HUP USR1 USR2

crashes=0
for ((try = 0; ; try++)); do
    if make_slice && [ -z "$stopped" ]; then
        # In a session of its own, so that Ctrl-C here asks the hosts to save rather than cutting the connection.
        if [ -n "$dry_run" ]; then
            on_all_hosts "$train"
            exit
        fi
        run setsid gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$train" &
        job=$!
        while kill -0 "$job" 2>/dev/null; do # a signal ends `wait` early
            wait "$job"
        done
        wait "$job" # also of a job that ended while the trap ran
        code=$?
    else
        code=255
    fi
    if [ -n "$stopped" ] || [ "$try" -ge "$restarts" ]; then break; fi
    case $code in
    4 | 6 | 75 | 134 | 137 | 143 | 255) ;; # a hang, a lost peer, a stop; 255: the slice or the connection was lost
    *) break ;;
    esac
    if [ "$code" = 134 ] && ! tpu ssh --worker=0 --command="test -e first_step"; then
        crashes=$((crashes + 1))
    else
        crashes=0
    fi
    if [ "$crashes" = 2 ]; then
        echo "exit code 134 twice before the first step: a crash, of the compiler perhaps; not started again." >&2
        break
    fi
    secs=$((try < 6 ? 10 * 2 ** try : 600))
    echo "exit code $code: again in $secs s ($((try + 1)) of $restarts)" >&2
    run sleep "$secs"
    [ -z "$stopped" ] || break
done
exit "$code"
