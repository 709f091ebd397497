
# --- rollout servers, on the nodes after the training nodes ----------------------------------------

servers=@NUM_SERVERS@
servers_per_node=@SERVERS_PER_NODE@
gpus_per_server=@GPUS_PER_SERVER@ # 0: no GPUs

# One server, started again whenever it dies: its requests go to the others meanwhile.
serve() {
    local number=$1 node place first code gpus=()
    place=$((number % servers_per_node))
    node=${nodes[training_nodes + number / servers_per_node]}
    trap '' USR1 # the servers are needed until the run has saved
    trap - TERM
    if ((gpus_per_server)); then
        first=$((place * gpus_per_server))
        # Inside the step: Slurm sets this variable itself, to all of the node's GPUs.
        gpus=(env "CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + gpus_per_server - 1)))")
    fi
    while :; do
        "${step[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
            --output="$logs/job_%j_server_$number.log" \
            "${gpus[@]}" "${tropd[@]}" serve "${config[@]}" --number "$number" --host "$(address "$node")"
        code=$?
        case $code in
            0) return ;;
            2) say "server $number cannot start: $run/logs says why" && return ;;
            *) say "server $number on $node ended with code $code and is started again" ;;
        esac
        sleep 5
    done
}

start_servers() {
    local number
    # Where servers of an earlier start listened, others may listen now: they must not get our token.
    rm -f "$run"/servers/server_*.json
    for ((number = 0; number < servers; number++)); do serve "$number" & done
}
