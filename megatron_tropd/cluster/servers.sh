
# --- rollout servers, on the nodes after the training nodes ----------------------------------------

servers=@NUM_SERVERS@
servers_per_node=@SERVERS_PER_NODE@
gpus_per_server=@GPUS_PER_SERVER@ # 0: no GPUs

# One server, started again whenever it dies: its requests go to the others meanwhile.
serve() {
    local number=$1 node child='' place first code
    place=$((number % servers_per_node))
    node=${nodes[training_nodes + number / servers_per_node]}
    # shellcheck disable=SC2064 # the child of this moment is looked up when the signal comes
    trap 'kill $child 2>/dev/null; wait; exit' TERM
    trap '' USR1 # the servers are needed until the run has saved
    trap - EXIT
    if ((gpus_per_server)); then
        first=$((place * gpus_per_server))
        CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + gpus_per_server - 1)))
        export CUDA_VISIBLE_DEVICES
    fi
    while :; do
        "${step[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
            --output="$run/logs/job_%j_server_$number.log" \
            "${tropd[@]}" serve "${config[@]}" --number "$number" --host "$(address "$node")" &
        child=$!
        wait "$child"
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
    for ((number = 0; number < servers; number++)); do serve "$number" & done
}
