# make paper | paper-kept | paper-quick | paper-plan | paper-graph: tables, figures and audit from training runs (Snakemake, see workflow/Snakefile)
#   DATASET=cuhk PRESET=paper     real data          SEEDS=5            five seeds; SEEDS=0,3,5-7: these
#   PROFILE=slurm                 a cluster          JOBS=2             jobs at once (on a cluster: in the queue)
#   REDO=1                        all runs anew, by the code as it is now: runs/code-<fingerprint>/, beside the kept ones
#   CONFIG="variants=[full,sdm]"  any value of workflow/config.yaml
#   make paper-gpu JOBS=8   the training runs on one GPU, JOBS at once, before `make paper` makes the rest
#   ARGS="..."                    anything else that snakemake understands
DATASET ?= synth
PRESET  ?=
SEEDS   ?= 0,1,2
PROFILE ?= local
JOBS    ?=
CONFIG  ?=
REDO    ?=

QUOTED = $(foreach c,$(CONFIG),'$(c)')
# snakemake takes the last --config alone
OURS = $(if $(filter --config -C,$(ARGS)),$(error ARGS="--config ..." would replace DATASET, PRESET and SEEDS: use CONFIG="name=value"))
PAPER_CONFIG = $(OURS)--config dataset=$(DATASET) $(if $(PRESET),preset=$(PRESET)) 'seeds=$(SEEDS)' $(if $(REDO),redo=true) $(QUOTED)
QUICK_CONFIG = $(OURS)--configfile workflow/quick.yaml --config dataset=$(DATASET) $(if $(PRESET),preset=$(PRESET)) \
  $(if $(filter-out file,$(origin SEEDS)),'seeds=$(SEEDS)') $(if $(REDO),redo=true) $(QUOTED)
SNAKEMAKE = $(BIN)/snakemake --snakefile workflow/Snakefile --profile workflow/profiles/$(PROFILE) $(if $(JOBS),$(if $(filter local,$(PROFILE)),--cores,--jobs) $(JOBS))
# one at a time; who holds the lock may clear what a killed one has left
ONE_PAPER = mkdir -p runs && flock -n runs/.paper.lock sh -c '"$$@" --unlock >/dev/null 2>&1; exec "$$@"' paper
OR_SAY = || { echo 'not done: where another make paper is running, wait for it; else start again, it goes on where it stopped'; exit 1; }

.PHONY: paper paper-kept paper-quick paper-plan paper-graph paper-gpu

paper: $(STAMP)
	@$(ONE_PAPER) $(SNAKEMAKE) $(PAPER_CONFIG) $(ARGS) $(OR_SAY)

paper-kept: $(STAMP)
	@$(ONE_PAPER) $(SNAKEMAKE) $(PAPER_CONFIG) kept=true --forcerun collect $(ARGS) $(OR_SAY)

paper-quick: $(STAMP)
	@$(ONE_PAPER) $(SNAKEMAKE) $(QUICK_CONFIG) $(ARGS) $(OR_SAY)

paper-plan: $(STAMP)
	@$(SNAKEMAKE) $(PAPER_CONFIG) --dry-run --quiet rules $(ARGS)

paper-graph: $(STAMP)
	@set -e; graph=$$($(SNAKEMAKE) $(PAPER_CONFIG) --rulegraph --quiet all); printf '%s\n' "$$graph" | $(BIN)/python workflow/graph.py workflow/graph.png

paper-gpu: $(STAMP)
	@$(if $(CONFIG)$(REDO),$(error paper-gpu knows DATASET PRESET SEEDS JOBS ARGS, not CONFIG and REDO)):
	$(BIN)/python workflow/gpu_grid.py --dataset $(DATASET) $(if $(PRESET),--preset $(PRESET)) --seeds '$(SEEDS)' --kept tables $(if $(JOBS),--processes $(JOBS)) $(ARGS)
