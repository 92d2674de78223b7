#!/bin/bash
# Sends the chain. No job can start before all of them are accepted.
set -euo pipefail
cd "$(dirname "$0")"
# their values are already in the scripts
for name in "${!SBATCH_@}" SLURM_CLUSTERS; do unset "$name"; done
# the id among what a site's sbatch prints: the last line that is one
send() {
  local said id
  said=$(sbatch "$@") || return
  id=$(sed -nE 's/^ *([0-9]+)(;.*)?$/\1/p' <<<"$said" | tail -n 1)
  if [ -z "$id" ]; then echo "sbatch gave no job id (squeue shows a held job): $said" >&2; return 1; fi
  echo "$id"
}
sent=()
trap 'code=$?; if [ "$code" -ne 0 ] && [ "${#sent[@]}" -gt 0 ]; then scancel "${sent[@]}"; fi' EXIT

# 1 data
job1=$(send --parsable '--bbf=my file' --hold '1 data.sbatch')
sent+=("$job1"); echo "$job1"
# pretrain
job2=$(send --parsable "--dependency=afterok:$job1" pretrain.sbatch)
sent+=("$job2"); echo "$job2"
# spare
job3=$(send --parsable "--dependency=afternotok:$job2" pretrain.sbatch "$job2")
sent+=("$job3"); echo "$job3"
# r
job4=$(send --parsable "--dependency=afterok:$job2?afterok:$job3" r.sbatch)
sent+=("$job4"); echo "$job4"
# alone
job5=$(send --parsable --hold alone.sbatch)
sent+=("$job5"); echo "$job5"

scontrol release "$job1"
