#!/bin/bash
# Sends the chain. No job can start before all of them are accepted.
set -euo pipefail
cd "$(dirname "$0")"
# their values are already in the scripts
for name in "${!SBATCH_@}"; do unset "$name"; done
sent=()
trap 'code=$?; if [ "$code" -ne 0 ] && [ "${#sent[@]}" -gt 0 ]; then scancel "${sent[@]}"; fi' EXIT

# 1 data
job1=$(sbatch --parsable '--bbf=my file' --hold '1 data.sbatch')
job1=${job1%%;*}; sent+=("$job1"); echo "$job1"
# pretrain
job2=$(sbatch --parsable "--dependency=afterok:$job1" pretrain.sbatch)
job2=${job2%%;*}; sent+=("$job2"); echo "$job2"
# spare
job3=$(sbatch --parsable "--dependency=afternotok:$job2" pretrain.sbatch "$job2")
job3=${job3%%;*}; sent+=("$job3"); echo "$job3"
# r
job4=$(sbatch --parsable "--dependency=afterok:$job2?afterok:$job3" r.sbatch)
job4=${job4%%;*}; sent+=("$job4"); echo "$job4"
# alone
job5=$(sbatch --parsable --hold alone.sbatch)
job5=${job5%%;*}; sent+=("$job5"); echo "$job5"

scontrol release "$job1"
