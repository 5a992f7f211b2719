TABLES = [
    f"{RESULTS}/tables/{name}"
    for name in (
        "scores.csv",
        "references.csv",
        "versus.csv",
        "seeds.csv",
        "results.txt",
        "table1.csv",
        "table1.md",
        "table1.html",
        "table5.csv",
        "table5.md",
    )
] + [f"{RESULTS}/figures/table1.svg"]


# Takes users.json, base, recipe and profiles themselves, not only the stamps: a failed job must never leave old scores
# behind.
rule score:
    input:
        cohorts=lambda w: cohorts(w.task, f"{w.augmentation}/{w.peft}/{w.history}"),
        users=f"{SPLIT}/users.json",
        queries=f"{SPLIT}/queries.jsonl",
        base=f"{BASE}/base.json",
        recipe=f"{SETTING}/recipe.json",
        profiles=lambda w: profiles(w.task, w.augmentation),
        own=lambda w: profile_sources(w.task, w.augmentation, users(w.task)),
    output:
        scores=f"{SETTING}/scores.json",
        scored=f"{SETTING}/scored.jsonl",
        submission=f"{SETTING}/submission.json",
    log:
        f"{LOGS}/{{task}}/{{augmentation}}/{{peft}}/{{history}}/score.log",
    conda:
        "../../envs/light.yaml"
    params:
        version=keys.SCORING,
    shell:
        "oppu score-setting {output.scores:q} --scored {output.scored:q} --submission {output.submission:q}"
        " --users {input.users:q} --queries {input.queries:q} > {log:q} 2>&1"


# What can be said without any model, from the same data. It takes longer than a check or a score, so it starts first.
rule references:
    input:
        users=f"{SPLIT}/users.json",
        queries=f"{SPLIT}/queries.jsonl",
        base=base_users,
    output:
        f"{TASK}/references.jsonl",
    log:
        f"{LOGS}/{{task}}/references.log",
    priority: 1
    conda:
        "../../envs/light.yaml"
    params:
        histories=lambda w: histories(w.task, users(w.task)),
        version=keys.SCORING,
        record=lambda w: as_json(tasks.task(w.task).model_dump()),
    shell:
        "oppu references {output:q} --task {wildcards.task:q} --base-users {input.base:q} --queries {input.queries:q}"
        " {params.histories:q} > {log:q} 2>&1"


rule tables:
    input:
        scored=expand(
            f"{RESULTS}/{{task}}/{{setting}}/scored.jsonl",
            task=TASKS,
            setting=SETTINGS,
        ),
        references=expand(f"{TASK}/references.jsonl", task=TASKS),
        paper=paper_table("table1"),
    output:
        tables=report(TABLES[:3], caption="../report/tables.rst", category="Tables"),
        seeds=report(TABLES[3], caption="../report/seeds.rst", category="Tables"),
        text=report(TABLES[4], caption="../report/tables.rst", category="Tables"),
        table1=report(TABLES[5:8], caption="../report/table1_page.rst", category="Tables"),
        figure=report(TABLES[-1], caption="../report/table1.rst", category="Figures"),
        plots=expand(f"{TASK}/plot.csv", task=TASKS),
        provenance=update(f"{RESULTS}/tables/provenance.json"),
    log:
        f"{LOGS}/tables.log",
    conda:
        "../../envs/light.yaml"
    params:
        bootstrap=CONFIG.bootstrap,
        seed=CONFIG.seed,
        significance=CONFIG.significance,
        paper=lambda w, input: [f"--paper={path}" for path in input.paper],
        results=lambda w: RESULTS,
        tasks=" ".join(TASKS),
        settings=" ".join(SETTINGS),
    shell:
        "oppu tables {params.results:q} --tasks {params.tasks:q} --settings {params.settings:q}"
        " --bootstrap {params.bootstrap:q} --seed {params.seed:q} --significance {params.significance:q}"
        " {params.paper:q} > {log:q} 2>&1"


# What there is to learn from, per task: Table 5. Nothing waits for it, so it comes last.
rule statistics:
    input:
        users=f"{SPLIT}/users.json",
        queries=f"{SPLIT}/queries.jsonl",
        base=base_users,
        model=lambda w: files_of_model(CONFIG.model.path),
    output:
        f"{TASK}/statistics.json",
    log:
        f"{LOGS}/{{task}}/statistics.log",
    priority: -1
    conda:
        "../../envs/light.yaml"
    params:
        histories=lambda w: histories(w.task, users(w.task)),
        model=CONFIG.model.path,
        revision=[f"--revision={CONFIG.model.revision}"] if CONFIG.model.revision else [],
    shell:
        "oppu statistics {output:q} --task {wildcards.task:q} --base-users {input.base:q} --queries {input.queries:q}"
        " --model {params.model:q} {params.revision:q} {params.histories:q} > {log:q} 2>&1"


rule table5:
    input:
        statistics=expand(f"{TASK}/statistics.json", task=TASKS),
        paper=paper_table("table5"),
    output:
        csv=report(f"{RESULTS}/tables/table5.csv", caption="../report/table5.rst", category="Tables"),
        md=report(f"{RESULTS}/tables/table5.md", caption="../report/table5.rst", category="Tables"),
        provenance=update(f"{RESULTS}/tables/table5.provenance.json"),
    log:
        f"{LOGS}/table5.log",
    priority: -1
    conda:
        "../../envs/light.yaml"
    params:
        paper=lambda w, input: [f"--paper={path}" for path in input.paper],
    shell:
        "oppu table5 {output.csv:q} {input.statistics:q} {params.paper:q} > {log:q} 2>&1"


# Hyperparameters are chosen on held-out base users: snakemake --cores all --configfile config/config.yaml config/tune.yaml -- tune
rule tune_setting:
    input:
        users=f"{SPLIT}/users.json",
        queries=f"{SPLIT}/queries.jsonl",
        base=f"{BASE}/base.json",
        base_users=base_users,
        recipe=f"{TASK}/{{augmentation}}/{CONFIG.tune.peft}/full/recipe.json",
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
        gpu=GPU,
    params:
        histories=lambda w: histories(w.task, users(w.task)),
        lr=" ".join(map(str, CONFIG.tune.lr)),
        epochs=" ".join(map(str, CONFIG.tune.epochs)),
        profiles=lambda w: PROFILES.format(**w),
    shell:
        "oppu --gpus {resources.gpu} tune {output:q}"
        " --recipe {input.recipe:q} --base {input.base:q} --base-users {input.base_users:q}"
        " --queries {input.queries:q} --lr {params.lr:q} --epochs {params.epochs:q} --profiles {params.profiles:q}"
        " {params.histories:q} > {log:q} 2>&1"


rule tune:
    input:
        expand(
            f"{TASK}/{{augmentation}}/tune.csv",
            task=TASKS,
            augmentation=CONFIG.augmentations,
        ),
