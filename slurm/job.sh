# shellcheck shell=bash disable=SC2154
# What every batch file does around its srun line: bookkeeping before it, and after it the decision what happens next.
# The head of the batch file sets:
#   state           folder of the run's small files        stands_in_for   id of the job in whose place a spare runs
#   requeue         yes, no                                 code            the run's copy of the code, named by its
#   gpus_per_node   GPUs of each node                                       SHA-256; empty: what Python finds itself
#   max_gpu_s       GPU-seconds for all attempts of the     tasks, cpus     per node, and cores of each; no cpus: what
#                   run; 0: no limit                                        the job got, shared out
#   srun_args=() program=() arguments=()   words of the srun line; "${program[@]}" --version must work
#   sruns=() always=                       : for one srun line; or functions that set, for each of several, tasks, cpus,
#                                          srun_args, arguments and width, the most nodes (none: all); always: one
#                                          more, the last, which also comes when the job ends for good
#   site()          modules, set-up lines and environment of the site
# For the ranks it exports JOB_VERDICT, JOB_TRIES, JOB_DEADLINE and JOB_LIMIT (slurm/verdict.py), and JOB_RANKS.
least_s=60   # of the allowed GPU time: with less left nothing is started
most_tries=2 # attempts without progress
server_s=600 # for a file server that went away

# may be unset when the job was sent with --export=NONE
export PATH="${PATH:-/usr/local/bin:/usr/bin:/bin}"

# What a shell, a job or an mpiexec around this job's submission has left behind, and srun or the ranks would obey; what
# Slurm sets for this job stays. slurm/environment.py reads the list from here.
foreign='JOB_VERDICT JOB_TRIES JOB_DEADLINE JOB_LIMIT JOB_RANKS PIPELINE_LAUNCH PIPELINE_PARENT
  RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_*
  SUBMITIT_* PMI_* PMIX_* OMPI_COMM_* OMPI_UNIVERSE_SIZE SLURM_CLUSTERS SQUEUE_* SINFO_* SACCT_* SCANCEL_* SCONTROL_*
  SRUN_* SALLOC_* SLURM_NTASKS* SLURM_NPROCS SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_GTIDS SLURM_STEP* SLURM_SRUN_*
  SLURM_CPU_BIND* SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_MEM_* SLURM_DISTRIBUTION SLURM_DIST_PLANESIZE SLURM_EXACT SLURM_EXCLUSIVE SLURM_OVERCOMMIT
  SLURM_OVERLAP SLURM_HINT SLURM_THREADS SLURM_THREADS_PER_CORE SLURM_CORE_SPEC SLURM_CONSTRAINT SLURM_TIMELIMIT
  SLURM_WAIT SLURM_LABELIO SLURM_STDINMODE SLURM_STDOUTMODE SLURM_STDERRMODE SLURM_OPEN_MODE SLURM_MULTI_PROG
  SLURM_RELATIVE SLURM_USE_MIN_NODES SLURM_SPREAD_JOB SLURM_WORKING_DIR SLURM_REMOTE_CWD SLURM_PROLOG SLURM_EPILOG
  SLURM_TASK_PROLOG SLURM_TASK_EPILOG SLURM_KILL_BAD_EXIT SLURM_NO_KILL SLURM_DISABLE_STATUS SLURM_IMMEDIATE'
set -f
for name in $(compgen -e); do
  for pattern in $foreign; do
    # shellcheck disable=SC2254
    case $name in $pattern) unset -v "$name" ;; esac
  done
done
set +f
unset -v CUDA_VISIBLE_DEVICES # that of the login shell: Slurm gives each step its own

# signals are for the ranks; this shell lives on to decide what happens next
ended=no
trap 'ended=yes' TERM
trap : USR1 USR2

fail() {
  echo "$1" >&2
  exit "$2"
}
# the first line of a file, when it matches: what stands in a run folder is never run, nor computed with, unseen
read_line() {
  local line=
  if [ -f "$1" ]; then read -r -n 4096 line <"$1"; fi 2>/dev/null
  [[ $line =~ $2 ]]
}
# ends this job for good: no requeue, and spare jobs end at once
over() {
  echo "attempt $attempt: $1; not started again" >&2
  echo "$2 $1" >"$series.over"
  if [ -n "$always" ] && [ -n "$at_work" ] && [ "$at_work" != "$always" ] && [ "$ended" = no ]; then
    "$always"
    start_ranks
  fi
  exit "$2"
}

# a script that outlived its node's slurmd, or its turn, must not end or requeue the attempt that came after it
leave_to_next() {
  shown=$(timeout 60 scontrol show job "$SLURM_JOB_ID" 2>/dev/null)
  if [[ $shown =~ Restarts=([0-9]+) ]] && [ "${BASH_REMATCH[1]}" != "$attempt" ]; then
    echo "attempt $attempt: code $exit_code; Slurm has begun attempt ${BASH_REMATCH[1]}, which goes on alone"
    exit "$last"
  fi
}
# a job that Slurm is ending: a cancelled one must not come back, a preempted one comes back by itself unless its
# script ends first, so wait to be killed; only after the time limit is it ours to ask
wait_if_ended() {
  if [ "$ended" = yes ] && [ "$(date +%s)" -lt "$end" ]; then
    echo "attempt $attempt: code $exit_code; Slurm is ending this job"
    sed -i "/^$this\$/d" "$JOB_TRIES" 2>/dev/null # no fault of ours
    if [ "$requeue" != yes ]; then exit "$last"; fi
    for _ in 1 2 3 4 5; do
      sleep 2
      if [ "$(timeout 60 squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null)" != RUNNING ]; then
        trap - TERM
        sleep 3600
        exit "$last"
      fi
    done
    ended=no # somebody's signal, or a preemption with time to spare: both want a requeue
  fi
}
ask() {
  answer=$(timeout 60 squeue -h -j "$SLURM_JOB_ID" -o %T 2>&1) || return
  if [ "$answer" = COMPLETING ]; then ended=yes; fi # TERM may reach this shell late, or never
  wait_if_ended
  leave_to_next
  # with time to spare Slurm signals the ranks alone, as somebody's scancel does; this tells the two apart
  if [[ $shown =~ \ PreemptTime=([0-9T:-]+) ]] && [ "$(date -d "${BASH_REMATCH[1]}" +%s)" -ge "$began" ]; then
    preempted=', preempted'
  fi
  answer=$(timeout 60 scontrol requeue "$SLURM_JOB_ID" 2>&1)
}
# has Slurm queue this job again, and waits to be ended
again() {
  if [ "$requeue" != yes ]; then exit "$last"; fi
  command -v scontrol >/dev/null || fail "attempt $attempt: code $exit_code, but no scontrol here" "$last"
  pause=1
  until ask; do
    case $answer in
    *disabled* | *enied* | *"nvalid job id"* | *"not permitted"*)
      fail "attempt $attempt: requeue refused: $answer" "$last"
      ;;
    esac
    echo "attempt $attempt: requeue not confirmed ($answer); again in $pause s"
    sleep "$pause"
    pause=$((pause < 16 ? pause * 2 : 30))
  done
  echo "attempt $attempt: code $exit_code$preempted, requeued"
  trap - TERM
  sleep 120 # Slurm ends this shell
  exit "$last"
}

# Killed alone (kill -9, the kernel short of memory), this shell asks for nothing, and Slurm fails the job for good. A step
# beside it lives on for Slurm's KillWait, in which an ending job may still be queued again, before what waits for it is
# judged. TERM while the shell lives is Slurm ending the job, or somebody stopping it: then there is nothing to ask.
# shellcheck disable=SC2329
stand_in() { # the shell's process; runs in a bash of its own, with the variables that are handed to it
  local job tries=0
  trap '' USR1 USR2
  trap 'if kill -0 "$1"; then exit; fi' TERM
  kill -0 "$1" || exit # cannot be seen from here
  while kill -0 "$1"; do
    sleep 1 &
    wait $!
  done
  for _ in {1..60}; do
    job=$(timeout 60 scontrol --oneliner show job "$SLURM_JOB_ID")
    if [ -n "$job" ] && [[ $job != *JobState=RUNNING* ]]; then break; fi
    sleep 1
  done
  # 9: killed; 125: out of memory; anything else is how the shell ended by itself
  if ! [[ $job =~ \ ExitCode=0:(9|125)\  ]] || [[ $job != *" Restarts=$attempt "* ]]; then exit; fi
  echo killed >"$state/$this.killed"
  if [ -s "$JOB_TRIES" ]; then tries=$(wc -l <"$JOB_TRIES"); fi
  if [ "$tries" -ge "$most_tries" ]; then
    echo "137 its batch script was killed, $most_tries attempts without progress" >"$series.over"
  elif [ "$requeue" = yes ]; then
    for _ in {1..60}; do
      timeout 60 scontrol requeue "$SLURM_JOB_ID" && exit
      sleep 1
    done
  fi
}

at_work=
attempt=${SLURM_RESTART_COUNT:-0}
this=$SLURM_JOB_ID.$attempt
exit_code=76 last=76 end=9999999999 began=0 preempted=''
# a file server that went away comes back: ten minutes here, then in the queue
gone='ransport endpoint|timed out|Host is down|No route to host|Stale file handle|reset by peer|caused connection abort|Remote I/O'
for ((waited = 0; ; waited += 10)); do
  said=$(export LC_ALL=C; { mkdir -p "$state" && ls "$state" ${code:+"$code"}; } 2>&1 >/dev/null | head -n 1)
  if ! [[ $said =~ $gone ]]; then break; fi
  if [ "$waited" = 0 ]; then echo "attempt $attempt: $said; waiting up to $server_s s for the file server"; fi
  if [ "$waited" -ge "$server_s" ]; then again; fi
  sleep 10
done
mkdir -p "$state" || fail "$state: cannot be made" 6
series=$state/${stands_in_for:-$SLURM_JOB_ID}
# whoever may write into the run folder could plant a pipe, which would be waited for, a device, or a link, by which
# another file of the job's owner would be changed
if [ -L "$state" ]; then fail "$state: a link; take it away" 6; fi
for file in "$state/$this".{verdict,killed,gpu_s.new} "$series".{over,tries,bad_nodes}; do
  if [ -L "$file" ] || { [ -e "$file" ] && [ ! -f "$file" ]; }; then fail "$file: not a plain file; take it away" 6; fi
done
if [ -s "$series.over" ]; then
  read_line "$series.over" '^([0-9]{1,3}) ([[:print:]]{1,300})$' || fail "$series.over: not readable; take it away" 6
  fail "nothing to do in the place of job ${series##*/}: ${BASH_REMATCH[2]}" "${BASH_REMATCH[1]}"
fi
if [ -n "$code" ]; then
  sums=$(
    cd "$code" && {
      find . ! -type d ! -type f
      find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    } | sha256sum
  )
  if [ "${sums%% *}" != "${code##*/}" ]; then
    fail "$code: missing, or changed since this job was sent; python -m pipeline.submit --upgrade copies the code again" 7
  fi
fi
export JOB_VERDICT="$state/$this.verdict"
export JOB_TRIES="$series.tries"
bad_nodes="$series.bad_nodes"

# end of the allocation, read once: D-HH:MM:SS, MM:SS, or a word when there is no limit
began=$(date +%s)
left=$(timeout 60 squeue -h -j "$SLURM_JOB_ID" -o %L 2>/dev/null)
if [[ $left =~ ^([0-9]+-)?[0-9]+(:[0-9]+){1,2}$ ]]; then
  days=0
  if [[ $left == *-* ]]; then days=${left%%-*}; fi
  seconds=0
  IFS=: read -r -a parts <<<"${left#*-}"
  for part in "${parts[@]}"; do seconds=$((seconds * 60 + 10#$part)); done
  end=$((began + 10#$days * 86400 + seconds))
fi
deadline=$end

# GPU-seconds: each attempt notes its own in a file; their sum over all attempts and jobs of the run has a limit
gpus=$((gpus_per_node * SLURM_JOB_NUM_NODES))
note_gpu_s() {
  echo $((gpus * ($(date +%s) - began))) >"$state/$this.gpu_s.new" && mv "$state/$this.gpu_s.new" "$state/$this.gpu_s"
}
left_s() {
  local spent=0 file
  for file in "$state"/*.gpu_s; do
    if read_line "$file" '^[0-9]{1,15}$'; then spent=$((spent + 10#${BASH_REMATCH[0]})); fi
  done
  echo $(((max_gpu_s - spent) / gpus))
}
check_gpu_s() {
  if [ "$gpus" -gt 0 ] && [ "$max_gpu_s" -gt 0 ] && [ "$(left_s)" -lt $least_s ]; then
    over "the $((max_gpu_s / 60)) GPU-minutes that --max-gpu-hours allows are used up" 2
  fi
}
if [ "$gpus" -gt 0 ]; then
  note_gpu_s
  check_gpu_s
  if [ "$max_gpu_s" -gt 0 ] && [ $((began + $(left_s))) -lt "$end" ]; then
    deadline=$((began + $(left_s)))
    export JOB_LIMIT=gpu_hours
  fi
fi
(
  trap '' TERM
  while sleep 30; do
    kill -CONT $$ || exit # a stopped shell would keep the nodes for ever; one that was killed has no need of this
    read -r -a children </proc/$$/task/$$/children
    for child in "${children[@]}"; do # its srun would, too
      if [[ $(cat "/proc/$child/stat") =~ \)\ T\  ]]; then kill -CONT "$child"; fi
    done
    if [ "$gpus" -gt 0 ]; then
      note_gpu_s
      # for stages that look at no deadline, and for jobs of the run that spend at the same time
      if [ "$max_gpu_s" -gt 0 ] && [ "$(left_s)" -le 0 ]; then scancel --signal=TERM "$SLURM_JOB_ID"; fi
    fi
  done
) >/dev/null 2>&1 &
watching=$!
disown # its end is no news
trap 'kill -9 "$watching" 2>/dev/null; if [ "$gpus" -gt 0 ]; then note_gpu_s; fi' EXIT
if [ "$deadline" -lt 9999999999 ]; then export JOB_DEADLINE=$deadline; fi

echo "attempt $attempt: on $SLURM_JOB_NODELIST, this script on $SLURMD_NODENAME" # by which lost nodes are told later

# nodes that an earlier attempt found to be bad do not take part
spared=()
if [ -s "$bad_nodes" ]; then
  mapfile -t spared < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -Fxf "$bad_nodes")
  if [ "${#spared[@]}" -ge "$SLURM_JOB_NUM_NODES" ]; then spared=(); fi
fi
usable=$((SLURM_JOB_NUM_NODES - ${#spared[@]}))
without=()
if [ "${#spared[@]}" -gt 0 ]; then
  printf -v list '%s,' "${spared[@]}"
  without=(--exclude="${list%,}")
  echo "attempt $attempt: without ${spared[*]}, found bad before"
fi
if [ -f "$state/$SLURM_JOB_ID.$((attempt - 1)).killed" ]; then
  echo "attempt $attempt: the batch script of the attempt before was killed; queued again by the step beside it"
fi
echo "$this" >>"$JOB_TRIES"

site
if [ -n "$code" ]; then
  # before any other copy, whatever the working folder is; a byte-code file would change the copy
  export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
fi
# "16,4(x2)": srun takes one number for all nodes, so the smallest share
least=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-${SLURM_CPUS_ON_NODE:-1}}" | sed 's/(.*//' | sort -n | head -n 1)
# Slurm numbers a job's steps from 0 in each attempt, and an srun that outlived its attempt ends its step by number:
# empty steps give neighbouring attempts, of two steps at a time, different numbers
beside=(--overlap --mem=0 --gres=none --mpi=none) # a step that waits for no other to be cleared away
for ((step = 0; step < attempt % 4 * 2; step++)); do
  timeout 60 srun --nodes=1 --ntasks=1 "${beside[@]}" --export=ALL true </dev/null >/dev/null 2>&1
done
if [ -n "$SLURMD_NODENAME" ]; then
  given=$(declare -p attempt most_tries requeue series state this && declare -f stand_in)
  env -u SLURM_GPUS -u SLURM_GPUS_PER_NODE -u SLURM_GPUS_PER_TASK \
    srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${beside[@]}" --export=ALL \
    bash -c "$given; stand_in $$" </dev/null >/dev/null 2>&1 &
  disown
fi
start_ranks() {
  local nodes=${width:-$usable} share=$((least > tasks ? least / tasks : 1))
  if [ "$nodes" -gt "$usable" ]; then nodes=$usable; fi
  if [ -z "$cpus" ] || { [ -n "$width" ] && [ "$cpus" -gt "$share" ]; }; then cpus=$share; fi
  export JOB_RANKS=$((nodes * tasks)) # what the ranks must be as many as
  export PYTHONUNBUFFERED=1           # srun's --unbuffered gives ranks a terminal, for which they draw bars into the log
  srun --nodes="$nodes" --ntasks="$JOB_RANKS" --ntasks-per-node="$tasks" --cpus-per-task="$cpus" --export=ALL --kill-on-bad-exit=1 \
    "${srun_args[@]}" "${without[@]}" "${program[@]}" "${arguments[@]}"
}
exit_code=0
for at_work in "${sruns[@]}" ${always:+"$always"}; do
  if [ "$ended" = yes ] && [ "$at_work" != "${sruns[0]}" ]; then exit_code=75 && break; fi
  "$at_work"
  start_ranks
  exit_code=$?
  if [ "$exit_code" != 0 ]; then break; fi
done

# the first rank that failed knows best; srun's own code mixes those of all ranks
last=$exit_code
silent=no
nodes=
if read_line "$JOB_VERDICT" '^([0-9]{1,3})(( [A-Za-z0-9][A-Za-z0-9._-]*)*)$'; then
  exit_code=${BASH_REMATCH[1]}
  nodes=${BASH_REMATCH[2]}
  last=$exit_code
elif ! [[ $exit_code =~ ^([03-9]|7[5-7])$ ]]; then # killed, or it did not start
  echo "attempt $attempt: no rank said why it ended (code $exit_code)"
  silent=yes
  exit_code=76
fi

# whether the job's program starts at all on one of its nodes
starts() {
  timeout 60 srun --nodes=1 --ntasks=1 --nodelist="$1" --overlap --export=ALL "${srun_args[@]}" "${program[@]}" --version
} 2>&1 </dev/null

if [ "$exit_code" != 0 ]; then leave_to_next; fi
case $exit_code in
0) exit 0 ;;
75 | 76 | 77) ;;
*) over "ended with code $exit_code" "$exit_code" ;;
esac
sleep 2 # ranks hear of a cancel before others do
wait_if_ended
if [ $silent = yes ]; then
  all=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  tried=$(
    for node in $all; do starts "$node" && echo "it starts on $node" & done
    wait
  )
  good=$(sed -n 's/^it starts on //p' <<<"$tried")
  if [ -n "$good" ]; then
    nodes=$(grep -vxF "$good" <<<"$all")
  elif grep -qE 'execve\(\): .*(No such file|Permission denied)' <<<"$tried"; then # no fault of a node
    over "the program is on none of the nodes: python, setup and container of the profile say where it is" 7
  fi
  for node in $nodes; do echo "attempt $attempt: the program does not start on $node"; done
fi
for node in $nodes; do echo "$node" >>"$bad_nodes"; done
if [ -s "$JOB_TRIES" ] && [ "$(wc -l <"$JOB_TRIES")" -ge $most_tries ]; then
  over "code $exit_code, $most_tries attempts without progress" "$last"
fi
if [ "$gpus" -gt 0 ]; then
  note_gpu_s
  check_gpu_s
fi
again
