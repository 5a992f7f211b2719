# What a setting's cells depend on besides data and base. A rule, so that every reader sees a changed value.
rule recipe:
    output:
        f"{SETTING}/recipe.json",
    log:
        f"{LOGS}/{{task}}/{{augmentation}}/{{peft}}/{{history}}/recipe.log",
    localrule: True
    conda:
        "../../envs/light.yaml"
    params:
        recipe=lambda w: as_json(recipe.cell_recipe(CONFIG, w.task, w.augmentation, w.peft, w.history)),
    shell:
        "printf '%s\\n' {params.recipe:q} > {output:q} 2> {log:q}"


# Trains and predicts the stale users of a cohort; users/{user}/ is not declared, so nothing finished is ever deleted.
# With several processes (a profile's set-resources) each makes a share of the users; base and pooled train in one.
rule cells:
    input:
        sources,
        base=f"{BASE}/base.json",
        recipe=f"{SETTING}/recipe.json",
        adapters=borrowed,
        profiles=lambda w: profile_stamp(w, f"cohorts/{w.cohort}"),
    output:
        f"{SETTING}/cohorts/{{cohort}}.json",
    log:
        f"{LOGS}/{{task}}/{{augmentation}}/{{peft}}/{{history}}/{{cohort}}.log",
    benchmark:
        f"{BENCHMARKS}/{{task}}/{{augmentation}}/{{peft}}/{{history}}/{{cohort}}.tsv"
    conda:
        "../../envs/oppu.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        gpu=GPU,
        processes=1,
    params:
        base_users=lambda w: f"{SPLIT}/base.jsonl".format(**w),
        histories=members,
        users=lambda w: f"{SPLIT}/users.json".format(**w),
        mended=lambda w: mended(f"{SETTING}/cohorts/{{cohort}}.json".format(**w)),
        profiles=lambda w: PROFILES.format(**w),
    shell:
        "oppu --gpus {resources.gpu} cells {output:q}"
        " --recipe {input.recipe:q} --base {input.base:q} --base-users {params.base_users:q}"
        " --users {params.users:q} --profiles {params.profiles:q} --mended {params.mended:q}"
        " --processes {resources.processes} {params.histories:q} > {log:q} 2>&1"


# The control `pooled`: one adapter for all test users. It lies in the setting's folder; no user's cell holds it.
rule pooled:
    input:
        users=f"{SPLIT}/users.json",
        base=f"{BASE}/base.json",
        recipe=f"{TASK}/{{augmentation}}/pooled/{{history}}/recipe.json",
        profiles=lambda w: profiles(w.task, w.augmentation),
    output:
        f"{TASK}/{{augmentation}}/pooled/{{history}}/pooled.json",
    log:
        f"{LOGS}/{{task}}/{{augmentation}}/pooled/{{history}}/pooled.log",
    benchmark:
        f"{BENCHMARKS}/{{task}}/{{augmentation}}/pooled/{{history}}/pooled.tsv"
    conda:
        "../../envs/oppu.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        gpu=GPU,
    params:
        histories=lambda w: histories(w.task, users(w.task)),
        mended=lambda w: mended(f"{TASK}/{{augmentation}}/pooled/{{history}}/pooled.json".format(**w)),
        profiles=lambda w: PROFILES.format(**w),
    shell:
        "oppu --gpus {resources.gpu} pooled {output:q}"
        " --recipe {input.recipe:q} --base {input.base:q} --profiles {params.profiles:q}"
        " --mended {params.mended:q} {params.histories:q} > {log:q} 2>&1"


# One cell by name: a cohort of one. This job only stamps, it cannot fail halfway; update() keeps Snakemake from
# deleting the file first. What the cell and its profile are made from are inputs too: else a failed job leaves old answers.
rule cell:
    input:
        f"{SETTING}/cohorts/{{user}}.json",
        history=lambda w: histories(w.task, {w.user} & set(users(w.task))),
        base=f"{BASE}/base.json",
        recipe=f"{SETTING}/recipe.json",
        profile=lambda w: profile_stamp(w, f"cohorts/{w.user}"),
        own=lambda w: profile_sources(w.task, w.augmentation, [w.user]),
    output:
        update(f"{SETTING}/users/{{user}}/predictions.jsonl"),
    log:
        f"{LOGS}/{{task}}/{{augmentation}}/{{peft}}/{{history}}/{{user}}.stamp.log",
    localrule: True
    conda:
        "../../envs/light.yaml"
    shell:
        "touch -c {output:q} 2> {log:q}"
