# All commands of this repository; `make help` lists them. Variables of the shell have no effect: write them after make.
PROFILE := demo
STUDY :=
DATA :=
RUN :=
SET :=
ALL :=
CLUSTER :=
SITE :=
DRY :=
FROM :=
TO :=
OPTIONS :=
BENCH := gans metrics stats diffusion phantom preprocess
ONLY :=
OUTPUTS :=
MODELS :=
IN := .venv/bin/
RUNNER := $(IN)python -m elbowsynth.run study --study "$(STUDY)" --profile "$(PROFILE)" --data "$(DATA)" --run "$(RUN)" --set '$(SET)' --cluster "$(CLUSTER)" --site "$(SITE)"

# Compiled modules are kept, also where a container forbids it: without them each process compiles torch and diffusers anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help study inpaint import test fuzz mutants bench lab site readme prepare lock bundle install clean
.DEFAULT_GOAL := help

help: ## List the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18
	@echo; echo '  PROFILE=smoke|demo|paper  STUDY=NAME|FILE  DATA=FOLDER  RUN=NAME (below _runs)  SET="epochs=3 flux.decay_rate=-0.7"  ALL=1'

install: .venv/installed ## Install the packages of requirements.lock into .venv (other commands do this when needed)

.venv/installed: requirements.lock settings.ini setup.py workflow/install.sh
	@sh workflow/install.sh

study: install ## Run the stages of the study that are out of date, and write its report; CLUSTER=slurm SITE=FILE: as jobs of Slurm; DRY=1: list the jobs
	@$(RUNNER) $(if $(DRY),--dry)

inpaint: install ## Inpaint DATA=FOLDER with the base models, without fine-tuning
	@$(RUNNER) --set 'split= epochs=0 boost_epochs=0 sdxl.out=sdxl_untrained flux.out=flux_untrained' --target sdxl --target flux

import: install ## Convert DATA=FOLDER, FROM=dicom|mura|fracatlas|yolo|folder|png16|grazpedwri|chestxray14, to images and labels.csv in TO=FOLDER (STUDY=NAME|FILE)
	@$(IN)python -m elbowsynth.data.import_cli $(FROM) "$(DATA)" "$(TO)" $(if $(STUDY),--study "$(STUDY)" )$(OPTIONS)

test: install ## Run the tests; ALL=1 includes those that take minutes
	@ELBOWSYNTH_ALL="$(ALL)" ELBOWSYNTH_HYPOTHESIS=same $(IN)python -m pytest -n 2 --dist loadgroup --durations 25 tests

fuzz: install ## Run the property tests with new random examples
	@ELBOWSYNTH_ALL="$(ALL)" ELBOWSYNTH_HYPOTHESIS=new $(IN)python -m pytest tests -m hypothesis

mutants: install ## Plant bugs in a copy of the library and see that tests fail, a quarter of an hour (ONLY="words")
	@$(IN)python tests/mutants/run.py $(ONLY)

bench: install ## Run benchmarks against reference implementations into bench/results, about an hour (BENCH="gans metrics")
	@for b in $(BENCH); do $(IN)python bench/$$b.py || exit; done

lab: install ## Open the notebooks in JupyterLab, with the parameters of PROFILE, the folder of RUN and the images of DATA
	@if [ -e .git ]; then git config --local filter.elbowsynth-notebook.clean '$(IN)python workflow/clean_notebook.py %f' && $(IN)python workflow/clean_notebook.py; fi
	@PATH="$(CURDIR)/.venv/bin:$$PATH" ELBOWSYNTH_PROFILE="$(PROFILE)" ELBOWSYNTH_RUN="$(RUN)" ELBOWSYNTH_DATA="$(DATA)" JUPYTER_PREFER_ENV_PATH=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONWARNINGS="ignore:IProgress not found" PYTHONPATH="$(CURDIR)/workflow$${PYTHONPATH:+:$$PYTHONPATH}" $(IN)jupyter lab nbs/index.ipynb --ServerApp.root_dir="$(CURDIR)" --FileContentsManager.post_save_hook=clean_notebook.after_save --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.extension_manager=readonly

site: install ## Render the site into _docs, with the results of the committed run or of RUN=_runs/NAME
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(IN)python -m elbowsynth.site $(if $(RUN),--run "$(RUN)")

readme: install ## Write README.md from nbs/index.ipynb
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(IN)python -m elbowsynth.site --readme

prepare: install ## Before a commit: clean the notebooks, record their parameters as defaults, export the library, write README.md (OUTPUTS="nbs/2_data/31_masks.ipynb": add these with their new outputs)
	@PATH="$(CURDIR)/.venv/bin:$$PATH"; nbdev_clean && $(IN)python -m elbowsynth.run defaults && rm -f elbowsynth/_modidx.py && nbdev_export && $(IN)ruff check -q --select F821,F401 elbowsynth && $(IN)python -m elbowsynth.site --readme $(if $(OUTPUTS),&& git -c filter.elbowsynth-notebook.clean=cat add --renormalize $(OUTPUTS)) && git status --short

lock: install ## Write requirements.lock from settings.ini
	@sh workflow/lock.sh

bundle: install ## Pack the checkout, the packages and MODELS="FOLDER FOLDER" into one archive for machines without internet, 3 GB
	@sh workflow/bundle.sh $(MODELS)

clean: ## Remove generated files: .venv, the site, caches (not _runs)
	rm -rf .venv _docs _proc build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find elbowsynth tests bench -name __pycache__ -prune -exec rm -rf {} +
