#!/bin/bash
# Sends the chain. No job can start before all of them are accepted.
set -euo pipefail
cd "$(dirname "$0")"
# their values are already in the scripts
for name in "${!SBATCH_@}" "${!SQUEUE_@}" SLURM_CLUSTERS; do unset "$name"; done
# the id in what a site's sbatch prints: its only line that is one, else the newest job's with the comment
send() {
  local said id word code=0
  said=$(sbatch "$@") || code=$?
  id=$(sed -nE 's/^ *([0-9]+)(;.*)?$/\1/p' <<<"$said")
  if [[ ! $id =~ ^[0-9]+$ ]]; then id=; fi
  if [ -z "$id" ] || [ "$code" != 0 ]; then
    for word; do case $word in --comment=*) id=$(tagged "${word#*=}") ;; esac; done
  fi
  if [ "$code" = 0 ] && [ -n "$id" ]; then echo "$id" && return; fi
  # a wrapper that failed after Slurm had taken the job
  if [ -n "$id" ] && grep -qw "$id" <<<"$said"; then scancel "$id"; fi
  echo "sbatch gave no job id: $said" >&2
  return 1
}
tagged() {
  squeue --noheader --states=all --user="$(id -u)" --format='%i %k' | while read -r id comment; do
    if [ "$comment" = "$1" ]; then echo "$id"; fi
  done | sort -n | tail -n 1
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
