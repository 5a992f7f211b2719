def members(w):
    "History files of a cohort; a cohort is a number or, for one cell alone, a user's key."
    everyone = users(w.task)
    if w.cohort in everyone:
        return histories(w.task, [w.cohort])
    if w.cohort.isdigit():
        return histories(w.task, everyone[int(w.cohort) * CONFIG.users_per_job :][: CONFIG.users_per_job])
    raise WorkflowError(f"{w.task} has no test user {w.cohort}; `oppu users {RESULTS}/{w.task}` lists them")


# What a setting's cells depend on besides data and base. A rule, so that every reader sees a changed value.
rule recipe:
    output:
        SETTING + "/recipe.json",
    params:
        recipe=lambda w: as_json(recipe.cell_recipe(CONFIG, w.task, w.augmentation, w.peft, w.history)),
    log:
        LOGS + "/{task}/{augmentation}/{peft}/{history}/recipe.log",
    conda:
        "../../envs/oppu.yaml"
    shell:
        "printf '%s\\n' {params.recipe:q} > {output:q} 2> {log:q}"


# Trains and predicts the stale users of a cohort; users/{user}/ is not declared, so nothing finished is ever deleted.
rule cells:
    input:
        histories=members,
        base=BASE + "/base.json",
        recipe=SETTING + "/recipe.json",
    output:
        SETTING + "/cohorts/{cohort}.json",
    params:
        base_users=SPLIT + "/base.jsonl",
        mended=lambda w: mended(f"{SETTING}/cohorts/{{cohort}}.json".format(**w)),
    log:
        LOGS + "/{task}/{augmentation}/{peft}/{history}/{cohort}.log",
    benchmark:
        BENCHMARKS + "/{task}/{augmentation}/{peft}/{history}/{cohort}.tsv"
    resources:
        mem_mb=4000,
    conda:
        "../../envs/oppu.yaml"
    shell:
        "oppu cells {output:q} --recipe {input.recipe:q} --base {input.base:q} --base-users {params.base_users:q}"
        " --mended {params.mended:q} {input.histories:q} > {log:q} 2>&1"


# One cell by name: a cohort of one. This job only stamps, it cannot fail halfway; update() keeps Snakemake from
# deleting the file first.
rule cell:
    input:
        SETTING + "/cohorts/{user}.json",
    output:
        update(SETTING + "/users/{user}/predictions.jsonl"),
    log:
        LOGS + "/{task}/{augmentation}/{peft}/{history}/{user}.stamp.log",
    conda:
        "../../envs/oppu.yaml"
    shell:
        "touch -c {output:q} 2> {log:q}"
