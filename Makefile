# Everything a person does here starts with make; `make help` lists it. Nothing of the shell's environment decides what runs: what is set is set behind make.
PROFILE := demo
DATA :=
RUN :=
SET :=
ALL :=
FROM :=
TO :=
WITH :=
BENCH := gans metrics stats diffusion phantom preprocess
IN := .venv/bin/
STUDY := $(IN)python -m elbowsynth.run study --profile "$(PROFILE)" --data "$(DATA)" --run "$(RUN)" --set '$(SET)'

.PHONY: help study inpaint import test bench lab site readme prepare lock install clean
.DEFAULT_GOAL := help

help: ## List the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18
	@echo; echo '  PROFILE=smoke|demo|paper  DATA=FOLDER  RUN=NAME (below _runs)  SET="epochs=3 wgan_gp.lr=1e-4"  ALL=1'

install: .venv/installed ## Make .venv from requirements.lock (the other commands do it when needed)

.venv/installed: requirements.lock settings.ini setup.py workflow/install.sh
	@sh workflow/install.sh

study: install ## Run the whole study, or what is left of it, and write its report
	@$(STUDY)

inpaint: install ## Draw with the untrained base models into the masks of DATA=FOLDER, without a split
	@$(STUDY) --set 'split= epochs=0 boost_epochs=0 sdxl.out=sdxl_untrained flux.out=flux_untrained' --target sdxl --target flux

import: install ## Turn DATA=FOLDER of FROM=dicom|mura|fracatlas|yolo|folder|png16 into TO=FOLDER, films with labels.csv
	@$(IN)python -m elbowsynth.data.importers $(FROM) "$(DATA)" "$(TO)" $(WITH)

test: install ## Run the tests; ALL=1 runs those that take minutes, too
	@ELBOWSYNTH_ALL="$(ALL)" $(IN)python -m pytest tests

bench: install ## Time what claims to be fast, beside what it is to be faster than, an hour or so; the tables go to bench/results (BENCH="gans metrics")
	@for b in $(BENCH); do $(IN)python bench/$$b.py || exit; done

lab: install ## Open the notebooks in JupyterLab, with the parameters of PROFILE
	@PATH="$(CURDIR)/.venv/bin:$$PATH" ELBOWSYNTH_PROFILE="$(PROFILE)" JUPYTER_PREFER_ENV_PATH=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONWARNINGS="ignore:IProgress not found" $(IN)jupyter lab nbs --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.extension_manager=readonly

site: install ## Render the site into _docs, with the committed run or RUN=_runs/NAME
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(IN)python -m elbowsynth.site $(if $(RUN),--run "$(RUN)")

readme: install ## Write README.md from nbs/index.ipynb
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(IN)python -m elbowsynth.site --readme

prepare: install ## Before a commit: clean the notebooks, export the library, write the README
	@PATH="$(CURDIR)/.venv/bin:$$PATH"; nbdev_clean && nbdev_export && $(IN)ruff check -q --select F821,F401 elbowsynth && $(IN)python -m elbowsynth.site --readme && git status --short

lock: install ## Write requirements.lock anew from settings.ini
	@sh workflow/lock.sh

clean: ## Remove what can be made again: .venv, the site, caches (not _runs)
	rm -rf .venv _docs _proc build *.egg-info .pytest_cache .ruff_cache elbowsynth/__pycache__ tests/__pycache__
