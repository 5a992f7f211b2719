# One PEFT Per User: the workflow. Which files and when is decided here and in workflow/rules/; how, in the package oppu.
#   snakemake --cores all                                        the default config: the sample, two tasks, minutes
#   snakemake --cores all --configfile config/paper.yaml         another config (config/README.md lists every key)
#   snakemake --cores all lamp --configfile config/paper.yaml    download LaMP's files for it
#   snakemake --cores all -n                                     what would run, and why
#   snakemake --cores all results/LaMP_2N/k0/lora/full/users/u-…/predictions.jsonl        one cell and what it needs


# A config file given by --configfile is a whole experiment: nothing of the default shines through it.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


onstart:
    choose_quickly(workflow.scheduler)
    # For provenance.json. No job has it as an input: who ran it, and from which commit, makes nothing stale.
    note_run(RESULTS, workflow.basedir, sys.argv, CONFIG.model_dump())


include: "workflow/rules/common.smk"
include: "workflow/rules/lamp.smk"
include: "workflow/rules/fixtures.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/profiles.smk"
include: "workflow/rules/base.smk"
include: "workflow/rules/cells.smk"
include: "workflow/rules/results.smk"
include: "workflow/rules/tiny_lm.smk"


# Stamps are listed too: otherwise a failed cohort whose old scores still stand would count as "nothing to be done".
rule all:
    default_target: True
    input:
        TABLES,
        f"{RESULTS}/tables/provenance.json",
        f"{RESULTS}/tables/table5.provenance.json",
        lambda w: [stamp for task in TASKS for setting in SETTINGS for stamp in cohorts(task, setting)],
        lambda w: [stamp for task in TASKS for name in AUGMENTATIONS for stamp in profiles(task, name)],
