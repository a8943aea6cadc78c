#!/bin/bash
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 8
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 12
#SBATCH --time 12:00:00
#SBATCH --requeue
#SBATCH --signal TERM@120
# A recipe on two nodes, a process a GPU: sbatch examples/cluster/slurm.sh RECIPE.yaml OUT
# srun tells every process its number; they meet on the first node. Two minutes before the
# end of its time a run saves and ends; a job that is requeued goes on from its last state.
set -e
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# Once, before all processes ask for the same files.
python -c "import limbeck.models.load as load, sys, yaml
tree = yaml.safe_load(open(sys.argv[1]))
[load.load_tokenizer(tree[role]['model']) for role in ('student', 'teacher') if (tree.get(role) or {}).get('model')]" "$1"
srun --kill-on-bad-exit=1 limbeck distill "$1" --out "$2" --resume
