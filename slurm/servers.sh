
# --- rollout servers, on the nodes after the training nodes ----------------------------------------

servers=@NUM_SERVERS@
servers_per_node=@SERVERS_PER_NODE@
gpus_per_server=@GPUS_PER_SERVER@ # 0: no GPUs

# A server's part of the step's GPUs (fields of a list, from 1), which Slurm names only inside the
# step: on a shared node they are not the first ones. The list given is for where it names none.
# shellcheck disable=SC2016
share='export CUDA_VISIBLE_DEVICES=$(echo "${CUDA_VISIBLE_DEVICES:-$2}" | cut -d, -f"$1"); '
share+='shift 2; exec "$@"'

# The address by which this node, the trainer's first, knows another one. That one may know its own
# name as 127.0.1.1, and a server that listens there is not to be reached.
resolved() {
    local found
    found=$(getent ahostsv4 "$1" | sed -n 's/^\([0-9.]*\) .*/\1/p' | head -n 1)
    case $found in
        '' | 127.*) echo "$1" ;;
        *) echo "$found" ;;
    esac
}

# How often in a row a server may end soon after its start (seconds); pauses between starts double.
most_ends=8 soon=600 first_pause=5 longest_pause=300

# One server, started again whenever it dies: its requests go to the others meanwhile. Without any
# the training ends, and the job decides.
serve() {
    local number=$1 place node first host code began ends=0 pause=$first_pause gpus=()
    place=$((number % servers_per_node))
    node=${nodes[training_nodes + number / servers_per_node]}
    trap '' USR1 # the servers are needed until the run has saved
    trap - TERM
    if ((gpus_per_server)); then
        first=$((place * gpus_per_server + 1))
        gpus=(sh -c "$share" sh "$first-$((first + gpus_per_server - 1))"
            "$(seq -s, 0 $((servers_per_node * gpus_per_server - 1)))")
    fi
    host=$(resolved "$(address "$node")")
    while :; do
        began=$SECONDS
        "${step[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
            --output="$logs/job_%j_server_$number.log" \
            ${gpus[@]+"${gpus[@]}"} "${tropd[@]}" serve "${config[@]}" --number "$number" --host "$host"
        code=$?
        case $code in
            0) return ;;
            2) say "server $number cannot start: $run/logs says why" && return ;;
        esac
        ((SECONDS - began < soon)) || ends=0 pause=$first_pause
        ((++ends < most_ends)) || break
        say "server $number on $node ended with code $code and is started again"
        sleep "$pause"
        pause=$((2 * pause < longest_pause ? 2 * pause : longest_pause))
    done
    say "server $number is given up: it ended $ends times, each within $soon s of its start, last" \
        "with code $code; $run/logs/job_${SLURM_JOB_ID}_server_$number.log says why"
}

start_servers() {
    local number
    # Where servers of an earlier start listened, others may listen now: they must not get our token.
    rm -f "$run"/servers/server_*.json
    for ((number = 0; number < servers; number++)); do serve "$number" & done
}
