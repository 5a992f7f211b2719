TABLES = [
    f"{RESULTS}/tables/{name}"
    for name in (
        "scores.csv",
        "references.csv",
        "versus.csv",
        "table1.csv",
        "table1.md",
        "results.txt",
    )
] + [f"{RESULTS}/figures/table1.svg"]


# Takes users.json, base, recipe and profiles themselves, not only the stamps: a failed job must never leave old scores behind.
rule score:
    input:
        cohorts=lambda w: cohorts(w.task, f"{w.augmentation}/{w.peft}/{w.history}"),
        users=f"{SPLIT}/users.json",
        queries=f"{SPLIT}/queries.parquet",
        base=f"{BASE}/base.json",
        recipe=f"{SETTING}/recipe.json",
        profiles=lambda w: profiles(w.task, w.augmentation),
        own=lambda w: profile_sources(w.task, w.augmentation, users(w.task)),
    output:
        scores=f"{SETTING}/scores.json",
        scored=f"{SETTING}/scored.parquet",
        submission=f"{SETTING}/submission.json",
    log:
        f"{LOGS}/{{task}}/{{augmentation}}/{{peft}}/{{history}}/score.log",
    conda:
        "../../envs/oppu.yaml"
    shell:
        "oppu score {output.scores:q} --scored {output.scored:q} --submission {output.submission:q}"
        " --task {wildcards.task:q} --users {input.users:q} --queries {input.queries:q} > {log:q} 2>&1"


# What can be said without any model, from the same data.
rule references:
    input:
        histories=lambda w: histories(w.task, users(w.task)),
        users=f"{SPLIT}/users.json",
        queries=f"{SPLIT}/queries.parquet",
        base=base_users,
    output:
        f"{TASK}/references.json",
    log:
        f"{LOGS}/{{task}}/references.log",
    conda:
        "../../envs/oppu.yaml"
    shell:
        "oppu references {output:q} --task {wildcards.task:q} --base-users {input.base:q} {input.histories:q}"
        " > {log:q} 2>&1"


rule tables:
    input:
        scored=expand(
            f"{RESULTS}/{{task}}/{{setting}}/scored.parquet",
            task=TASKS,
            setting=SETTINGS,
        ),
        references=expand(f"{TASK}/references.json", task=TASKS),
    output:
        tables=report(
            TABLES[:-1],
            caption="../report/tables.rst",
            category="Tables",
        ),
        figure=report(TABLES[-1], caption="../report/table1.rst", category="Figures"),
    log:
        f"{LOGS}/tables.log",
    conda:
        "../../envs/oppu.yaml"
    params:
        bootstrap=CONFIG.bootstrap,
        seed=CONFIG.seed,
        results=lambda w: RESULTS,
        tasks=" ".join(TASKS),
        settings=" ".join(SETTINGS),
    shell:
        "oppu tables {params.results:q} --tasks {params.tasks:q} --settings {params.settings:q}"
        " --bootstrap {params.bootstrap:q} --seed {params.seed:q} > {log:q} 2>&1"


# Hyperparameters are chosen on held-out base users: snakemake --cores all --configfile config/config.yaml config/tune.yaml -- tune
rule tune_setting:
    input:
        histories=lambda w: histories(w.task, users(w.task)),
        queries=f"{SPLIT}/queries.parquet",
        base=f"{BASE}/base.json",
        base_users=base_users,
        recipe=f"{TASK}/{{augmentation}}/lora/full/recipe.json",
        profiles=lambda w: profiles(w.task, w.augmentation),
    output:
        f"{TASK}/{{augmentation}}/tune.csv",
    log:
        f"{LOGS}/{{task}}/{{augmentation}}/tune.log",
    conda:
        "../../envs/oppu.yaml"
    threads: 1
    resources:
        mem_mb=4000,
    params:
        lr=" ".join(map(str, CONFIG.tune.lr)),
        epochs=" ".join(map(str, CONFIG.tune.epochs)),
        profiles=lambda w: PROFILES.format(**w),
    shell:
        "oppu tune {output:q} --recipe {input.recipe:q} --base {input.base:q} --base-users {input.base_users:q}"
        " --queries {input.queries:q} --lr {params.lr:q} --epochs {params.epochs:q} --profiles {params.profiles:q}"
        " {input.histories:q} > {log:q} 2>&1"


rule tune:
    input:
        expand(
            f"{TASK}/{{augmentation}}/tune.csv",
            task=TASKS,
            augmentation=CONFIG.augmentations,
        ),
