# Profiles (App. J): needed only by augmentations whose prompts carry one; shared by all of them.
rule profile_recipe:
    output:
        f"{PROFILES}/recipe.json",
    log:
        f"{LOGS}/{{task}}/profiles/recipe.log",
    localrule: True
    conda:
        "../../envs/light.yaml"
    params:
        recipe=lambda w: as_json(recipe.profile_recipe(CONFIG, w.task)),
    shell:
        "printf '%s\\n' {params.recipe:q} > {output:q} 2> {log:q}"


# Writes the stale profiles of a cohort; users/{user}.json is not declared, so that nothing finished is ever deleted.
rule profiles:
    input:
        sources,
        recipe=f"{PROFILES}/recipe.json",
        model=profile_model,
        own=lambda w: own_texts(w.task, [os.path.basename(path).removesuffix(".json") for path in members(w)]),
    output:
        f"{PROFILES}/cohorts/{{cohort}}.json",
    log:
        f"{LOGS}/{{task}}/profiles/{{cohort}}.log",
    benchmark:
        f"{BENCHMARKS}/{{task}}/profiles/{{cohort}}.tsv"
    conda:
        "../../envs/oppu.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        gpu=GPU * (CONFIG.profiles.backend == "llm"),
    params:
        histories=members,
        own=lambda w: f"{CONFIG.profiles.own}/{w.task}",
        mended=lambda w: mended(f"{PROFILES}/cohorts/{{cohort}}.json".format(**w)),
    shell:
        "oppu --gpus {resources.gpu} profiles {output:q}"
        " --recipe {input.recipe:q} --own {params.own:q} --mended {params.mended:q}"
        " {params.histories:q} > {log:q} 2>&1"


# Base users' profiles stand in base.jsonl, which is not declared either: a killed job goes on where it was.
rule base_profiles:
    input:
        users=base_users,
        recipe=f"{PROFILES}/recipe.json",
        model=profile_model,
    output:
        f"{PROFILES}/base.json",
    log:
        f"{LOGS}/{{task}}/profiles/base.log",
    benchmark:
        f"{BENCHMARKS}/{{task}}/profiles/base.tsv"
    conda:
        "../../envs/oppu.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        gpu=GPU * (CONFIG.profiles.backend == "llm"),
    params:
        mended=lambda w: mended(f"{PROFILES}/base.json".format(**w)),
    shell:
        "oppu --gpus {resources.gpu} base-profiles {output:q}"
        " --recipe {input.recipe:q} --base-users {input.users:q}"
        " --mended {params.mended:q} > {log:q} 2>&1"


# All profiles of a task as one target, for DVC.
rule profiles_of:
    input:
        lambda w: [f"{RESULTS}/{w.task}/profiles/base.json", *cohorts(w.task, "profiles")],
    output:
        touch(f"{PROFILES}/all.txt"),
    localrule: True
